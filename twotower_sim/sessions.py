"""Conversations: when they start, and what the prompts of their turns share."""

from dataclasses import replace

import numpy as np

from twotower_sim.requests import Prefixes, Requests


def started(requests: Requests, starts_ns: np.ndarray) -> Requests:
    """Requests whose arrivals count from the start of their session, with sessions that start at ``starts_ns``, in the
    order of their numbers; in order of arrival."""
    assert requests.sessions is not None
    _, session = np.unique(requests.sessions, return_inverse=True)
    arrival_ns = requests.arrival_ns + starts_ns[session]
    return replace(requests, arrival_ns=arrival_ns).take(arrival_ns.argsort(kind="stable"))


def stretched(requests: Requests, rate_scale: float) -> np.ndarray:
    """Arrivals (n,) when sessions start ``rate_scale`` times as often; inside a session, time passes as it did."""
    assert requests.sessions is not None
    _, first, session = np.unique(requests.sessions, return_index=True, return_inverse=True)
    start_ns = requests.arrival_ns[first][session]
    return start_ns / rate_scale + (requests.arrival_ns - start_ns)


def grown_prefixes(requests: Requests, block_tokens: int) -> Prefixes:
    """What prompts share if each turn's repeats the one before it and its answer, as chats do; a prompt that is no
    longer than the one before starts anew."""
    assert requests.sessions is not None
    blocks = requests.input_tokens // block_tokens
    order = np.lexsort((np.arange(len(requests)), requests.sessions))
    session, length = requests.sessions[order], requests.input_tokens[order]
    anew = np.ones(len(order), bool)
    anew[1:] = (session[1:] != session[:-1]) | (length[1:] <= length[:-1])
    text = np.cumsum(anew) - 1  # one that only grows
    longest = np.zeros(text[-1] + 1, np.int64)
    np.maximum.at(longest, text, blocks[order])
    base = np.concatenate(([0], np.cumsum(longest)[:-1]))
    of_request = np.empty(len(order), np.int64)
    of_request[order] = base[text]
    first = np.concatenate(([0], np.cumsum(blocks)))
    hashes = np.arange(first[-1]) + np.repeat(of_request - first[:-1], blocks)
    return Prefixes(first, hashes, block_tokens)

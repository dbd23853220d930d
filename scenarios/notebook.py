# %% [markdown]
# # Which GPUs, how many, which threshold?
# A chat service expects ten times the traffic that Azure's had. It promises nine of ten requests their first tokens
# within two seconds, and the whole answer within fifteen. What does it have to rent?
#
# VS Code opens this file as a notebook, Jupyter does with jupytext. It takes half a minute, and writes into `out/`.
# The charts need `pip install 'twotower-sim[plot]'`.

# %%
import altair

from twotower_sim import api

# %% [markdown]
# ## The traffic
# A fingerprint holds figures of a trace, and none of its requests; from it load of any length and rate is drawn.

# %%
drawn = api.trace_sample("azure-conversation-2023", "out/chat.csv", 3000, rate_scale=10)
traffic = api.trace_describe("out/chat.csv")
f"{traffic.stats.arrivals.rate_rps:.0f} requests/s; at most {traffic.stats.arrivals.peak[1]:,} in a minute"

# %%
traffic.lengths.round()

# %% [markdown]
# ## A first guess
# A scenario is a mapping of what its file would hold. Latencies are in milliseconds.

# %%
load = {"kind": "fingerprint", "fingerprint": "azure-conversation-2023", "requests": 3000, "rate_scale": 10}
promised = {"time_to_first_token_ms": 2000, "request_latency_ms": 15000}
chat = {"name": "two-tower", "workload": load, "deployment": {"gpu": "h200", "replicas": 4}, "slo": promised}
run = api.run(chat)
run.metrics.loc[["time_to_first_token", "request_latency", "commit_gap"], ["avg", "p50", "p90", "p99"]].round()

# %%
verdict = run.summary["saturation"]["verdict"]
verdict, run.summary["provenance"]

# %%
took = run.requests.assign(seconds=run.requests["finish_s"] - run.requests["arrival_s"])
latencies = altair.Chart(took).mark_circle(opacity=0.3).encode(x="output_tokens", y="seconds", color="nfe")
latencies

# %% [markdown]
# ## Which threshold, which batch?
# Every point has the same requests with the same luck. Where a load is not borne, latencies say how long the run was,
# and nothing else. A lower threshold is faster; what it does to the quality is published at 0.8 alone.

# %%
axes = {"decoding.gamma": [0.6, 0.7, 0.8, 0.9], "scheduler.max_num_seqs": [32, 64, 128, 256]}
study = {
    "scenario": chat,
    "set": {"deployment.replicas": 2},
    "design": {"kind": "grid", "axes": axes},
    "metrics": ["request_latency.p90", "output_token_throughput_per_gpu"],
}
sweep = api.sweep(study)
borne = sweep.points[sweep.points["saturation"] == "STABLE"]
borne.pivot(index="decoding.gamma", columns="scheduler.max_num_seqs", values="request_latency.p90").round()

# %% [markdown]
# ## Two towers or one?
# The same four GPUs: two replicas of two towers, or four of the autoregressive model. Differences are paired.

# %%
two, one = chat | {"deployment": {"gpu": "h200", "replicas": 2}}, {"decoding": {"kind": "autoregressive"}}
compared = api.compare([two, chat | one | {"name": "one-tower"}])
compared.differences.query("scenario == 'one-tower'").set_index("metric")[
    ["mean", "difference", "low", "high", "ratio"]
]

# %% [markdown]
# ## What to rent
# Every combination of choices is a candidate. Of each, the fewest replicas are found that keep the promise, at the bad
# end of 95 % intervals.

# %%
asked = {
    "scenario": chat,
    "objectives": {"time_to_first_token.p90": 2000, "request_latency.p90": 15000},
    "choices": {
        "deployment.gpu": ["h100-sxm", "h200", "b200"],
        "decoding": [{"kind": "two_tower", "gamma": 0.8}, {"kind": "autoregressive"}],
    },
    "most_gpus": 16,
    "quality_floor": 0.98,
}
plan = api.plan(asked)
plan.answer

# %%
costs = altair.Chart(plan.candidates).mark_bar().encode(x="usd_per_hour", y=altair.Y("candidate", sort="x"))
costs

# %%
plan.save("out/chat")

.PHONY: run test check

run:
	python3 -m venv .venv && .venv/bin/pip install -e . && .venv/bin/twotower-sim run scenarios/quickstart.yaml

test:
	{ test -x .venv/bin/pip || python3 -m venv .venv; } && .venv/bin/pip install -e '.[test]' && .venv/bin/pytest

check: test
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/lint-imports

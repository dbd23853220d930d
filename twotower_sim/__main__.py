"""Where the program starts: an interruption is caught before anything that takes time is imported."""

import sys


def main() -> None:
    try:
        from twotower_sim.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()

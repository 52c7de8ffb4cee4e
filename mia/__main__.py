"""python -m mia, and the command `mia`: Ctrl-C is heard from the first import on."""

import sys


def main() -> None:
    try:
        from mia.cli import main as run

        run()
    except KeyboardInterrupt:
        print("mia: stopped", file=sys.stderr)
        sys.exit(130)
    finally:
        # nothing is left to be done: a Ctrl-C while Python takes itself down just ends it
        if "signal" in sys.modules:
            import signal

            signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    main()

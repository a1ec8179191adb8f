"""`python -m compressible`: Ctrl-C while the command line is imported ends it as quietly as afterwards."""

import os
import signal
import sys


def _stop(*_: object) -> None:
    """End at once: raised as an error, an interrupt of an import may be swallowed, or told with a traceback."""
    try:
        os.write(2, b"stopped\n")
    finally:
        os._exit(130)


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else nobody hears it, as of a script
        signal.signal(signal.SIGINT, _stop)
    from compressible.companion.command_line import until_stopped

    sys.exit(until_stopped())

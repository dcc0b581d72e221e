"""Asks the zygote for a run, and ends as that ends: a program that stands for Python, see zygote.py.

python zygote_client.py SOCKET [ARGUMENTS OF PYTHON ...]
"""

import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence

# What is handed on to the run. A client that is killed hands nothing on; the zygote then kills its run.
SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def connect(address: str) -> socket.socket:
    """A connection to the zygote for one run. Closing it kills the run."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    return connection


def start(
    connection: socket.socket,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    folder: str,
    streams: list[int],
) -> int:
    """Starts the run, with these arguments of Python and standard streams. Returns its number, which its group has."""
    request = {"arguments": arguments, "environment": dict(environment), "folder": folder}
    content = json.dumps(request).encode()
    socket.send_fds(connection, [len(content).to_bytes(8, "big")], streams)
    connection.sendall(content)
    return read_number(connection)


def read_number(connection: socket.socket) -> int:
    """The next answer: after the number of the run comes its exit status, negative for a signal."""
    with connection.makefile("rb", buffering=0) as answers:  # or it would take what comes later
        return int(answers.readline())


def main(address: str, *arguments: str) -> int:
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until there is somebody to hand them on to
    with connect(address) as connection:
        run = start(connection, arguments, os.environ, os.getcwd(), [0, 1, 2])

        def hand_on(number: int, _: object) -> None:
            with contextlib.suppress(ProcessLookupError):  # it has ended
                os.kill(run, number)

        for number in SIGNALS:
            signal.signal(number, hand_on)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        code = read_number(connection)
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

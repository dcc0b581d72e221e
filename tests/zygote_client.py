"""Asks the zygote for a run, and ends as that ends: a program that stands for Python, see zygote.py.

python zygote_client.py SOCKET [ARGUMENTS OF PYTHON ...]
"""

import contextlib
import json
import os
import signal
import socket
import sys

# What is handed on to the run. A client that is killed hands nothing on; the zygote then kills its run.
SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def main(address: str, *arguments: str) -> int:
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until there is somebody to hand them on to
    request = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}
    content = json.dumps(request).encode()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        socket.send_fds(connection, [len(content).to_bytes(8, "big")], [0, 1, 2])
        connection.sendall(content)
        answers = connection.makefile("rb")
        run = int(answers.readline())

        def hand_on(number: int, _: object) -> None:
            with contextlib.suppress(ProcessLookupError):  # it has ended
                os.kill(run, number)

        for number in SIGNALS:
            signal.signal(number, hand_on)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        code = int(answers.readline())
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

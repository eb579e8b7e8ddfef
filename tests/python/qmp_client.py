"""Drives a server with QEMU's own QMP library, and prints what it saw as one JSON object.

usage: qmp_client.py SOCKET BACKUP-ID
"""

import asyncio
import json
import sys

from qemu.qmp import EventListener, ExecuteError, QMPClient


async def main(socket, backup):
    client = QMPClient("stillpoint-tests")
    listener = EventListener(names=["BACKUP_BEGUN", "BACKUP_ENDED"])
    client.register_listener(listener)
    await client.connect(socket)
    seen = {"greeting": client.greeting._asdict()["QMP"]}
    seen["version"] = await client.execute("query-version")
    seen["begun"] = await client.execute("backup-begin", {"id": backup})
    # Many at once: the library tells the replies apart by their ids.
    several = await asyncio.gather(
        *(client.execute("query-backups") for _ in range(20))
    )
    seen["backups"] = several[-1]
    seen["all_equal"] = all(one == several[0] for one in several)
    try:
        await client.execute("no-such-command")
        seen["error"] = None
    except ExecuteError as error:
        seen["error"] = {"class": error.error_class, "desc": str(error)}
    await client.execute("backup-abort", {"id": backup})
    # The library's time-out makes a missing event a failure, not a hang.
    seen["events"] = [
        dict(await asyncio.wait_for(listener.get(), timeout=60)) for _ in range(2)
    ]
    await client.disconnect()
    print(json.dumps(seen))


asyncio.run(main(*sys.argv[1:]))

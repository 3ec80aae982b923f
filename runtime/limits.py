"""What this process may use where a container, a batch system or ulimit gives it less than the
machine has: memory and processor time.

Linux says so in control groups, of version 1, of version 2, or of both at once. A limit anywhere
between a process's own group and the root of the tree holds, so the smallest counts.
"""

import math
import os
import re
from pathlib import Path

try:
    import resource
except ImportError:  # Windows
    resource = None

PROC = Path("/proc")


def groups(controller):
    """Folders of this process's control groups, from its own to the topmost that can be seen.

    controller: "memory" or "cpu". Empty where there are no control groups.
    """
    try:
        memberships = lines_of(PROC / "self/cgroup")
        mounts = lines_of(PROC / "self/mountinfo")
    except OSError:
        return []
    own = {}  # kind of file system -> path of the group in its tree
    for line in memberships:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            own["cgroup2"] = path
        elif controller in controllers.split(","):
            own["cgroup"] = path

    folders = []
    for line in mounts:
        # ID PARENT DEVICE ROOT PLACE OPTIONS [TAGS] - KIND SOURCE OPTIONS-OF-THE-TREE
        before, _, after = line.partition(" - ")
        root, place = before.split(" ")[3:5]
        kind = after.split(" ")[0]
        options = after.split(" ")[-1]
        if kind not in own or (kind == "cgroup" and controller not in options.split(",")):
            continue
        place = Path(re.sub(r"\\(\d{3})", lambda m: chr(int(m[1], 8)), place))
        # A container may see no more of the tree than its own group, under a path of the host
        path = own[kind]
        if root != "/":
            path = path.removeprefix(root) if path.startswith(root) else "/"
        folder = place / path.lstrip("/")
        if ".." in folder.parts or not folder.is_dir():
            folder = place
        folders.append(folder)
        while folder != place:
            folder = folder.parent
            folders.append(folder)
    return folders


def lines_of(path):
    """Lines of a text whose paths may be in any encoding."""
    return path.read_text(encoding="utf-8", errors="surrogateescape").split("\n")[:-1]


def number_in(path, word=0):
    """A number in a small file, infinite for "max" and for what version 1 has for no limit; None
    if it is not there."""
    try:
        text = path.read_text().split()[word]
        if text == "max" or int(text) > 2**62:
            return math.inf
        return int(text)
    except (OSError, ValueError, IndexError):
        return None


def file_pages(folder):
    """Bytes of a group's memory.stat that the kernel takes back when memory is short: files that
    were read and are not in use."""
    try:
        fields = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return int(fields.get("total_inactive_file", fields.get("inactive_file", 0)))
    except (OSError, ValueError):
        return 0


def memory_left():
    """Bytes until the first limit is reached, of control groups or of `ulimit -v`; infinite where
    there is none."""
    least = address_space_left()
    names = (
        ("memory.max", "memory.current"),
        ("memory.high", "memory.current"),  # beyond it the kernel slows the process down
        ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    )
    for folder in groups("memory"):
        for limit_name, usage_name in names:
            limit = number_in(folder / limit_name)
            if limit is not None:
                used = (number_in(folder / usage_name) or 0) - file_pages(folder)
                least = min(least, limit - used)
    return max(0, least)


def address_space_left():
    """Bytes until `ulimit -v` is reached; infinite where it is not set or not known."""
    if resource is None:
        return math.inf
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    pages = number_in(PROC / "self/statm")
    if limit == resource.RLIM_INFINITY or pages is None:
        return math.inf
    return limit - pages * os.sysconf("SC_PAGE_SIZE")


def processors():
    """How many processors' time control groups allow, 1.5 for instance; infinite without limit."""
    least = math.inf
    for folder in groups("cpu"):
        for quota, period in (
            (number_in(folder / "cpu.max"), number_in(folder / "cpu.max", 1)),
            (number_in(folder / "cpu.cfs_quota_us"), number_in(folder / "cpu.cfs_period_us")),
        ):
            if quota is not None and period and quota > 0:  # -1 is no limit
                least = min(least, quota / period)
    return least

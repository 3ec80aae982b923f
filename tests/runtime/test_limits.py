"""runtime/limits.py: what control groups of either version and ulimit leave to a process, in trees
as the kernel and containers show them."""

import math

import pytest

from runtime import limits, memory

V1 = "4:memory:{path}\n3:cpu,cpuacct:{path}\n1:name=systemd:/x\n"
V2 = "0::{path}\n"


@pytest.fixture
def system(tmp_path, monkeypatch):
    """system(version, path, root, files): control groups as /proc/self shows them.

    path: this process's group in its tree; root: what of the tree is mounted; files: {name: text},
    by their path below the place of the mount.
    """
    monkeypatch.setattr(limits, "PROC", tmp_path / "proc")
    monkeypatch.setattr(limits, "resource", None)
    folder = tmp_path / "proc/self"
    folder.mkdir(parents=True)

    def make(version, path, root="/", files=()):
        tree = tmp_path / "cgroup fs"
        tree.mkdir()
        place = str(tree).replace(" ", "\\040")
        mounts = "22 1 8:1 / / rw - ext4 /dev/sda rw\n"
        mounts += "23 1 0:5 / /mnt/\udcff rw - fuse  rw\n"  # no source, and a name in Latin-1
        if version == 1:
            for n, name in enumerate(("memory", "cpu,cpuacct", "freezer")):
                mounts += f"{n + 30} 22 0:{n} {root} {place}/{name} rw shared:5 - cgroup cgroup "
                mounts += f"rw,{name}\n"
                (tree / name).mkdir()
        else:
            mounts += f"30 22 0:9 {root} {place} rw - cgroup2 cgroup2 rw\n"
        (folder / "mountinfo").write_bytes(mounts.encode("utf-8", "surrogateescape"))
        (folder / "cgroup").write_text((V1 if version == 1 else V2).format(path=path))
        for name, text in dict(files).items():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_text(text)

    return make


NONE = 9223372036854771712  # how version 1 says that there is no limit


@pytest.mark.parametrize(
    "version, path, root, files, left",
    [
        # Version 2: its own limit, less what is used, of which files that were read come back
        (
            2,
            "/a",
            "/",
            {"a/memory.max": "1000\n", "a/memory.current": "700\n", "a/memory.stat": "anon 5\n"
             "inactive_file 200\n"},
            500,
        ),
        # A limit further up is the smaller one; "high" counts, too
        (
            2,
            "/a/b",
            "/",
            {"a/memory.max": "900", "a/memory.current": "100", "a/b/memory.max": "max",
             "a/b/memory.high": "950", "a/b/memory.current": "50"},
            800,
        ),
        (2, "/a", "/", {"a/memory.max": "max", "a/memory.current": "5"}, math.inf),
        # In a container with a name space of its own
        (2, "/", "/", {"memory.max": "300", "memory.current": "100"}, 200),
        # Used up: nothing is left, not less
        (2, "/", "/", {"memory.max": "300", "memory.current": "400"}, 0),
        # A group that was left, outside of what can be seen
        (2, "/../b", "/", {"memory.max": "300", "memory.current": "100"}, 200),
        # Version 1
        (
            1,
            "/a",
            "/",
            {"memory/a/memory.limit_in_bytes": "1000", "memory/a/memory.usage_in_bytes": "400",
             "memory/memory.limit_in_bytes": f"{NONE}", "memory/memory.usage_in_bytes": "10",
             "memory/a/memory.stat": "inactive_file 1\ntotal_inactive_file 50\n"},
            650,
        ),
        # Docker: the path is the host's, and only the group itself is mounted
        (
            1,
            "/docker/c0ffee",
            "/docker/c0ffee",
            {"memory/memory.limit_in_bytes": "1000", "memory/memory.usage_in_bytes": "400"},
            600,
        ),
        (
            1,
            "/docker/c0ffee/job",
            "/docker/c0ffee",
            {"memory/job/memory.limit_in_bytes": "500", "memory/job/memory.usage_in_bytes": "400",
             "memory/memory.limit_in_bytes": "1000", "memory/memory.usage_in_bytes": "400"},
            100,
        ),
        (1, "/elsewhere", "/", {}, math.inf),
        (
            1,
            "/a",
            "/",
            {"memory/memory.limit_in_bytes": f"{NONE}", "memory/memory.usage_in_bytes": "10"},
            math.inf,
        ),
    ],
)  # fmt: skip
def test_memory_left(version, path, root, files, left, system):
    system(version, path, root, files)
    assert limits.memory_left() == left


@pytest.mark.parametrize(
    "version, path, files, processors",
    [
        (2, "/a", {"a/cpu.max": "150000 100000\n"}, 1.5),
        (2, "/a", {"a/cpu.max": "max 100000", "cpu.max": "50000 100000"}, 0.5),
        (2, "/a", {"a/cpu.max": "max 100000"}, math.inf),
        (1, "/a", {"cpu,cpuacct/a/cpu.cfs_quota_us": "200000",
                   "cpu,cpuacct/a/cpu.cfs_period_us": "50000"}, 4.0),
        (1, "/a", {"cpu,cpuacct/a/cpu.cfs_quota_us": "-1",
                   "cpu,cpuacct/a/cpu.cfs_period_us": "100000"}, math.inf),
        (1, "/a", {"cpu,cpuacct/a/cpu.cfs_quota_us": "200000"}, math.inf),
    ],
)  # fmt: skip
def test_processors(version, path, files, processors, system):
    system(version, path, files=files)
    assert limits.processors() == processors


def test_where_there_are_no_control_groups(monkeypatch, tmp_path):
    """As on macOS."""
    monkeypatch.setattr(limits, "PROC", tmp_path)
    monkeypatch.setattr(limits, "resource", None)
    assert limits.groups("memory") == []
    assert limits.memory_left() == limits.processors() == math.inf


def test_a_limit_of_the_address_space_counts():
    """ulimit -v, whose failures PyTorch cannot tell from a machine without memory."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_AS)
    assert limits.address_space_left() == math.inf
    try:
        resource.setrlimit(resource.RLIMIT_AS, (2**46, before[1]))
        assert 2**45 < limits.address_space_left() < 2**46
        assert limits.memory_left() < 2**46
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_the_smaller_of_system_and_limit_is_free(monkeypatch):
    cpu = memory.torch.device("cpu")
    monkeypatch.setattr(memory, "system_memory", lambda: 4000)
    for left, free in (math.inf, 4000), (1000, 1000), (0, 0):
        monkeypatch.setattr(limits, "memory_left", lambda left=left: left)
        assert memory.free_memory(cpu) == free
        assert memory.free_memory(cpu, 4) == free // 4
    monkeypatch.setattr(memory, "system_memory", lambda: math.inf)
    monkeypatch.setattr(limits, "memory_left", lambda: math.inf)
    assert memory.free_memory(cpu) is None

"""./run.sh data stats: what is in a corpus that was built, from its manifest."""

from base.command import Parser, given_path

from .built import read_manifest


def main(argv):
    """`./run.sh data stats`. Returns the exit status; raises InputError."""
    parser = Parser(prog="./run.sh data stats", description="What is in a corpus that was built.")
    parser.add_argument("folder", type=given_path)
    folder = parser.parse_args(argv).folder
    manifest = read_manifest(folder)
    rows = [("source", "read", "kept", "train tokens", "val tokens", "bytes/token", "licence")]
    for name, source in manifest["sources"].items():
        read = manifest["stages"]["read"]["sources"][name]["documents"]
        kept = [source["kept"].get(split) or {} for split in ("train", "val")]
        documents, size, tokens = (
            sum(split.get(key, 0) for split in kept) for key in ("documents", "bytes", "tokens")
        )
        mixed = (source["mix"] or {}).get("tokens", 0)  # with its epochs
        val = kept[1].get("tokens", 0)
        ratio = f"{size / tokens:.2f}" if tokens else ""
        rows.append((name, read, documents, mixed, val, ratio, source["licence"]))
    splits = manifest["splits"]
    total = [splits[split]["tokens"] for split in ("train", "val")]
    rows.append(("all", manifest["documents"], manifest["documents_kept"], *total, "", ""))
    cells = [[f"{c:,}" if isinstance(c, int) else str(c) for c in row] for row in rows]
    widths = [max(len(row[k]) for row in cells) for k in range(len(cells[0]))]
    for row in cells:
        numbers = [c.rjust(w) for c, w in zip(row[1:-1], widths[1:])]
        print("  ".join([row[0].ljust(widths[0]), *numbers, row[-1]]).rstrip())
    return 0

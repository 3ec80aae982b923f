"""Logs made up for tests of the commands, and how they are called."""

import records.__main__


def main(capsys, *args):
    """(exit status, stdout, stderr) of ./run.sh records."""
    capsys.readouterr()  # what setting up the test had to say
    status = records.__main__.main([str(a) for a in args])
    return status, *capsys.readouterr()


def log(path, losses, total=None, times=None, every=10):
    """A log in modded-nanogpt's form: validations every so many steps with these losses, at
    these times (seconds)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    times = times or [every * (i + 1) / 10 for i in range(len(losses))]
    total = total or every * len(losses)
    lines = []
    for i, (loss, t) in enumerate(zip(losses, times), start=1):
        line = f"step:{every * i}/{total} val_loss:{loss} train_time:{1000 * t:.0f}ms"
        lines.append(f"{line} step_avg:1.00ms\n")
    path.write_text("".join(lines))
    return path


def logs(folder, lasts, **kwargs):
    """A folder of logs, one for each last loss."""
    for i, last in enumerate(lasts):
        log(folder / f"{i}.txt", [5.0, 4.0, last], **kwargs)
    return folder

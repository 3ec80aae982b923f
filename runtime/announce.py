"""What is about to run: all of it into the log, the gist on the screen."""

from pathlib import Path

from records.source import pack_source

from .options import flat

ROOT = Path(__file__).resolve().parent.parent


def announce(log, setup):
    """log: Log; setup: a trainer's Setup."""
    config = setup.config
    data = setup.data
    environment = setup.environment
    log.header(
        pack_source(ROOT) if log.active else None,
        environment=environment,
        config=flat(config),
        data=data.dataset.fingerprint,
        n_vocab=data.dataset.n_vocab,
    )

    goal = config.goal
    kernels = environment["kernels"]
    triton = [name for name, how in kernels.items() if how == "triton"]
    params = sum(p.numel() for p in setup.model.parameters())
    log.say(
        f"{goal.track}: {params / 1e6:.1f}M parameters, {environment['dtype']}, attention "
        f"{kernels['attention']}, Triton for {', '.join(triton) or 'nothing'}, "
        f"{environment['world_size']} x {environment['device']}, {setup.peak / 1e12:.2f} TFLOP/s "
        "in matrix products"
    )
    recomputed = ", blocks recomputed" if setup.model.recompute else ""
    log.say(f"memory by estimate: {setup.memory}{recomputed}")
    until = "to the last step"
    if goal.target is not None:
        until = f"until {goal.target_metric} reaches {goal.target}"
    log.say(
        f"training on {data.dataset.name} {until}, at most {config.schedule.steps} steps, seed "
        f"{goal.seed}; log in {log.folder}"
    )
    if data.val_bytes is None:
        log.say(
            "no bits per byte and no sample: these tokens have no text, or their vocabulary is out "
            "of reach"
        )

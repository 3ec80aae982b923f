"""What a run leaves: the best weights and the last ones, and where the time went."""

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from .evaluation import of_training_text
from .saved import fill, weights_of
from .steps import weights_after

# Of the process's time, in a result
PARTS = "imports_s", "data_s", "compile_s", "train_s", "validation_s", "sample_s", "save_s"


def time_by_part(parts):
    """{process_s and a name for each part: seconds}; what is in none of them is start-up."""
    found = {name: round(parts.seconds.get(name, 0.0), 2) for name in PARTS}
    return dict(process_s=round(parts.elapsed(), 2), **found)


def in_words(result):
    """The parts of the process's time in a line."""
    others = result["process_s"] - sum(result[name] for name in PARTS)
    parts = [f"{name.removesuffix('_s')} {result[name]:.1f}" for name in PARTS if result[name]]
    return f"{result['process_s']:.1f} s: {', '.join(parts)}, the rest {others:.1f}"


def train_bpb(setup, step):
    """Bits per byte of the model as it stands on a part of the training text, cut as the validation
    split is: what lies below validation's has been learned by heart. None without --train-eval, or
    where the tokens' bytes are not known."""
    config = setup.config
    if not config.run.train_eval or setup.data.val_bytes is None:
        return None
    micro_rows = setup.val.batches[0].inputs.shape[0]  # a graph that is there
    row_len = config.data.val_row_len
    split = of_training_text(setup.data, config.run.train_eval, row_len, micro_rows)
    alone = setup.world._replace(rank=0, size=1)
    stage_of = getattr(config.model, "train_eval_stage", config.model.val_stage)
    stage = stage_of(setup.stages[step].model, row_len)
    return setup.measure(setup.forward, stage, split, alone)["val_bpb"]


def cost_in_words(result):
    """What training took of energy and money, behind its time; empty where neither is known."""
    parts = []
    if result["energy_kwh"] is not None:
        parts.append(f"{result['energy_kwh']:.4f} kWh by the hardware's counters")
    if result["usd"] is not None:
        parts.append(f"${result['usd']:.2f}")
    return f"; training took {', '.join(parts)}" if parts else ""


def keep_best(setup, session):
    """Save the weights of the validation that was recorded, where none before was better."""
    if not session.is_best() or setup.world.rank:
        return
    with session.parts.part("save_s"):
        weights = weights_after(setup, max(1, session.at.step))
        if not session.log.save_weights(weights, "best.safetensors"):
            session.forget_best()


def save_weights(setup, result, log):
    """model.safetensors, which is the best validation's where there is no target; then the last
    step's are last.safetensors. The model has the former afterwards, for samples."""
    last = weights_of(setup.model)
    if result["best_step"] == result["steps"]:
        log.save_weights(last)
        log.remove("best.safetensors", "last.safetensors")
        return
    # A run that went on without getting better has its best weights under that name already
    log.rename("best.safetensors", "model.safetensors")
    log.save_weights(last, "last.safetensors")
    log.say(
        f"the weights are those of step {result['best_step']}, the best validation's; the last "
        "step's are in last.safetensors"
    )
    if log.active:
        try:
            with torch.no_grad():
                fill(setup.model, load_file(log.folder / "model.safetensors"))
        except (OSError, SafetensorError, ValueError) as e:
            log.say(f"the best weights cannot be read ({e}); samples are of the last step's")

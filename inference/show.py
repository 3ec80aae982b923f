"""Samples during a run and at its end, on the screen and in its log."""

from base import InputError, last_resort
from base.places import cache_folder
from kernels.drawing import Drawing
from runtime.steps import val_stage

from .engine import Engine, Request
from .options import FIXED, fixed_prompts
from .sampling import default_sampling


def show_samples(setup, step, log):
    """What the model makes of the track's prompts, or of how documents of validation begin.

    Returns whether there was something to show: one rank speaks for all, and of a text.
    """
    run = setup.config.run
    if setup.world.rank or not setup.data.val_bytes or not run.sample_tokens:
        return False
    dataset = setup.data.dataset
    stage = val_stage(setup, step)
    engine = Engine(
        setup.model,
        stage,
        dataset.tokenizer,
        setup.config.data.val_row_len,
        drawing=Drawing.build(cache_folder(), log.say),
    )
    sampling = default_sampling(dataset.tokenizer)
    requests = []
    prompts = list(run.sample_prompts)
    if FIXED in prompts:
        at = prompts.index(FIXED)
        prompts[at : at + 1] = fixed_prompts()
    try:
        for prompt in prompts or dataset.beginnings() or ("",):
            seed = setup.config.goal.seed + len(requests)
            requests.append(Request(prompt, run.sample_tokens, sampling, seed))
        for done in engine.generate(requests):
            log.say(f"--- a sample after step {step}\n{done.request.prompt}{done.text}\n---")
    except InputError as e:  # such as a prompt with characters that the tokenizer has not seen
        log.say(f"no samples: {e}")
        return False
    except Exception as e:  # whatever it is, the training and its result are worth more
        report = last_resort.write_report(e, log.folder)
        log.say(f"no samples: {last_resort.explain(e)}; the full report is in {report}")
        return False
    return True

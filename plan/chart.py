"""A picture of cost against loss: what every size of the ladder would take and reach."""

from base import InputError, whole_file
from tracks import track_names

from . import estimate


def ladder_tracks():
    """The tracks that are steps of a ladder, smallest first by name; all others if there are
    none."""
    return [name for name in track_names() if name.startswith("llama-")]


def draw(path, place, rule, options, data=None, own=()):
    """Write the picture; its format follows from the path. Raises InputError."""
    if path.suffix not in (".svg", ".png", ".pdf"):
        raise InputError(f"--chart {path}: expected a name that ends in .svg, .png or .pdf")
    plans = []
    for name in ladder_tracks() or ["laptop", "laptop-deep", "gpt2-small", "gpt2-medium"]:
        config = estimate.configured(["--track", name, *options])
        plans.append(estimate.make_plan(config, place, rule, data, **dict(own)))
    plans = [plan for plan in plans if plan["val_bpb"] is not None and plan["hours"]]
    if not plans:
        raise InputError("--chart: there is no prediction of loss to draw: ./run.sh plan ladder")
    plans.sort(key=lambda plan: plan["flops"])
    priced = all(plan["usd"] is not None for plan in plans)
    costs = [plan["usd"] if priced else plan["hours"] for plan in plans]

    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    values = [plan["val_bpb"] for plan in plans]
    below = [plan["val_bpb"] - plan["val_bpb_low"] for plan in plans]
    above = [plan["val_bpb_high"] - plan["val_bpb"] for plan in plans]
    axes.errorbar(costs, values, yerr=[below, above], fmt="o-", capsize=3)
    for i, (plan, cost) in enumerate(zip(plans, costs)):
        label = plan["track"] if plan["fits"] else f"{plan['track']} (does not fit)"
        place = (6, -14 if i % 2 else 6)  # neighbours' names below and above
        axes.annotate(label, (cost, plan["val_bpb"]), place, textcoords="offset points")
    axes.set_xscale("log")
    axes.margins(x=0.12)
    unit = "dollars" if priced else "hours"
    axes.set_xlabel(f"{unit} on {plans[0]['hardware']}, tokens: {rule}")
    axes.set_ylabel("bits per byte, predicted, 9 of 10 draws")
    axes.set_title(f"predicted from {plans[0]['val_bpb_from']}", fontsize=9)
    axes.grid(alpha=0.3)
    try:
        with whole_file(path) as aside:
            figure.savefig(aside, format=path.suffix[1:])
    except OSError as e:
        raise InputError(f"--chart {path}: {e.strerror}") from None

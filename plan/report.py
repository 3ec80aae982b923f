"""A plan in words."""


def quantity(n):
    """A number with a unit: 1.06B, 655M, 12.3k."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            digits = 2 if n / size < 10 else 1 if n / size < 100 else 0
            return f"{n / size:.{digits}f}{unit}"
    return f"{n:,.0f}"


def duration(hours):
    if hours < 1 / 60:
        return f"{hours * 3600:.0f} s"
    if hours < 1:
        return f"{hours * 60:.0f} minutes"
    return f"{hours:.1f} hours" if hours < 48 else f"{hours / 24:.1f} days"


def in_words(plan):
    """The plan as lines of text."""
    p = plan
    lines = [f"{p['track']} on {p['hardware']}"]

    parts = sorted(p["params_by_part"].items(), key=lambda item: -item[1])
    listed = ", ".join(f"{name} {quantity(n)}" for name, n in parts[:8])
    if len(parts) > 8:
        listed += f", {len(parts) - 8} others {quantity(sum(n for _, n in parts[8:]))}"
    lines.append(f"parameters  {p['params']:,}: {listed}")

    rule = "its own schedule" if p["tokens_rule"] == "track" else f"by {p['tokens_rule']}"
    passes = f", {p['passes']:.1f} passes over the data" if p["passes"] else ""
    lines.append(
        f"tokens      {p['tokens']:,} ({rule}; {p['tokens_per_param']:.1f} for a parameter"
        f"{passes}), {p['steps']:,} steps of {p['batch_tokens']:,}"
    )
    lines.append(f"FLOPs       {p['flops']:.2e}, {p['flops_per_token'] / 1e9:.3g} GFLOP a token")

    listed = ", ".join(f"{name} {size:.2f}" for name, size in p["memory_by_part"].items())
    there = "" if p["memory_free_gb"] is None else f" of {p['memory_free_gb']:.0f} GB"
    how = f"{p['rows']} rows in a pass" if p["fits"] else "with one row in a pass it does NOT fit"
    again = ", blocks recomputed" if p["recompute"] else ""
    lines.append(f"memory      {p['memory_gb']:.2f} GB{there} each ({listed}); {how}{again}")
    if not p["fits"]:
        lines += [f"            would fit: {line}" for line in p["advice"]]

    if p["hours"] is None:
        lines.append(f"time        unknown: {p['speed_from']}")
    else:
        word = "measured" if p["speed_measured"] else "predicted"
        exchange = f", {p['exchange_ms']:.1f} ms a step between GPUs" if p["exchange_ms"] else ""
        lines.append(
            f"time        {duration(p['hours'])} at {quantity(p['tokens_per_s'])} tokens/s ({word})"
        )
        lines.append(
            f"            {p['speed_from']}; peak {p['peak_tflops']:.3g} TFLOP/s each, "
            f"{p['peak_from']}{exchange}"
        )
        if p["usd"] is None:
            lines.append("money       no price known; --usd-per-hour gives one")
        else:
            lines.append(
                f"money       ${p['usd']:,.2f} at ${p['usd_per_hour']:.2f} an hour each "
                f"({p['usd_from']})"
            )
        if p["kwh"] is None:
            lines.append("energy      unknown; --watts gives what a device takes")
        else:
            source = f"{p['watts']:.0f} W each, {p['watts_from']}"
            lines.append(f"energy      {p['kwh']:,.2f} kWh, an estimate ({source})")

    if p["val_bpb"] is None:
        lines.append("loss        no runs to predict it from: ./run.sh plan ladder makes them")
    else:
        lines.append(
            f"loss        {p['val_bpb']:.3f} bits per byte, between {p['val_bpb_low']:.3f} and "
            f"{p['val_bpb_high']:.3f} in 9 of 10 draws (predicted from {p['val_bpb_from']})"
        )
    said = ", ".join(f"{name} {nats:.2f}" for name, nats in p["chinchilla_nats"].items())
    lines.append(
        f"            for comparison only, nats per token of Chinchilla's tokens and text: {said}"
    )
    lines += [f"note        {caveat}" for caveat in p["caveats"]]
    return lines

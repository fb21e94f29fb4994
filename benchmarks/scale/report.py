"""What was read from a program, as lines of the terminal."""

from .advice import gib, ms
from .links import MACHINES
from .outcome import Outcome


def lines(outcome: Outcome) -> str:
    """A program, its exchanges, and times of links and products."""
    case = outcome.case
    head = f"{case.devices} x {case.target}, {case.division}, {case.head} head"
    if outcome.error is not None:
        return f"{head}\n    {outcome.error}"
    text = [
        f"{head}: {outcome.tokens} tokens, {outcome.flops / 1e12:.1f} TFLOP, "
        f"{gib(outcome.argument_bytes)} GiB of arguments, "
        f"{gib(outcome.temporary_bytes)} of temporaries, {outcome.kernels} kernels "
        f"({outcome.seconds:.0f} s)"
    ]
    text += [
        f"    {each.count} {each.kind} among {each.members} ({each.near} of a host): "
        f"{each.bytes / 1e9:.3f} GB, {each.sent / 1e9:.3f} sent, "
        f"{each.sent_between_hosts / 1e9:.3f} between hosts"
        for each in outcome.collectives
    ]
    if outcome.unknown_loops:
        text.append(
            f"    {outcome.unknown_loops} loops have steps that only devices know; "
            "their bodies count once"
        )
    for machine in MACHINES:
        links = [f"{machine.near} {ms(machine.near_seconds(outcome.collectives))} ms"]
        if machine.far is not None:
            seconds = machine.far_seconds(outcome.collectives)
            links.append(f"{machine.far} {ms(seconds)} ms")
        products = ms(outcome.flops / machine.flops)
        text.append(f"    {machine.name}: products {products} ms, {', '.join(links)}")
    return "\n".join(text)

"""Which division to take when, in sentences whose numbers come from programs."""

import dataclasses
from collections.abc import Iterator

from .links import GPUS, TPUS, Machine
from .outcome import Outcome, Results

REPLICATED, SHARDED = "data parallel", "fully sharded"
VOCABULARY = "vocabulary parallel"
RING, TRANSPOSED = "sequence, ring", "sequence, all to all"
BOTH = "sequence, all to all, and vocabulary"


def sentences(results: Results) -> Iterator[str]:
    """Paragraphs of Markdown; one that lacks an outcome is left out."""
    counts = sorted({each.case.devices for each in results.outcomes})
    if not counts:
        return
    few, middle = counts[0], counts[len(counts) // 2]
    of_few, of_middle = (_Found.of(results, devices) for devices in (few, middle))
    sharded = [_Found.of(results, devices).sharded for devices in counts]
    yield from _replicated(of_few)
    yield from _sharded([each for each in sharded if each])
    yield from _stored(of_middle)
    yield from _vocabulary(of_middle, results.model.vocabulary)
    yield from _sequence(of_middle)


def share(outcome: Outcome, machine: Machine) -> float:
    """Time of the exchanges by time of the products."""
    return machine.seconds(outcome.collectives) * machine.flops / outcome.flops


def gib(count: float) -> str:
    return f"{count / 2**30:.1f}"


def gigabytes(count: float) -> str:
    return f"{count / 1e9:,.2f}"


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f}"


@dataclasses.dataclass(frozen=True)
class _Found:
    """The outcomes of one number of devices; None where there is none."""

    replicated: Outcome | None
    sharded: Outcome | None
    stored: Outcome | None
    vocabulary: Outcome | None
    ring: Outcome | None
    transposed: Outcome | None
    both: Outcome | None

    @classmethod
    def of(cls, results: Results, devices: int) -> "_Found":
        names = (VOCABULARY, RING, TRANSPOSED, BOTH)
        return cls(
            results.find(REPLICATED, "softlib", devices),
            results.find(SHARDED, "softlib", devices),
            results.find(SHARDED, "stored", devices),
            *(results.find(name, "softlib", devices) for name in names),
        )


def _replicated(found: _Found) -> Iterator[str]:
    every, own = found.replicated, found.sharded
    if every is None or own is None:
        return
    yield (
        f"**Data parallel**, with all parameters on every device, needs "
        f"{gib(every.argument_bytes)} GiB for these and the states of Adam, and "
        f"{gib(every.memory)} GiB with temporaries: {_fits(every, GPUS)}, "
        f"{_fits(every, TPUS)}. Divided over {own.case.devices} devices, parameters "
        f"and states take {gib(own.argument_bytes)} GiB. A device sends "
        f"{gigabytes(_sent(every))} GB for the sum of the gradients, and "
        f"{gigabytes(_sent(own))} GB for the gathers and sums of divided parameters."
    )


def _sharded(by_devices: list[Outcome]) -> Iterator[str]:
    if not by_devices:
        return
    last = by_devices[-1]
    shares = [f"{share(x, GPUS):.1%} on {x.case.devices}" for x in by_devices]
    yield (
        f"**Fully sharded** is what to begin with, while each device has a sequence of "
        f"its own ({last.tokens:,} tokens). Exchanges take, of the time of the "
        f"products, {_listed(shares)} {GPUS.name}, and {share(last, TPUS):.1%} on "
        f"{last.case.devices} {TPUS.name}. What is exchanged does not grow with the "
        "tokens: with fewer of them on a device its share is larger."
    )


def _stored(found: _Found) -> Iterator[str]:
    stored, own = found.stored, found.sharded
    if stored is None or own is None:
        return
    yield (
        f"**Stored logits** need {gib(stored.temporary_bytes)} GiB of temporaries, "
        f"fully sharded on {own.case.devices} devices, where the head of softlib needs "
        f"{gib(own.temporary_bytes)} and {_relative(own.flops, stored.flops)} flops. "
        f"A device sends {gigabytes(_sent(stored))} GB with them and "
        f"{gigabytes(_sent(own))} GB without."
    )


def _vocabulary(found: _Found, classes: int) -> Iterator[str]:
    divided, own = found.vocabulary, found.sharded
    if divided is None or own is None:
        return
    text = (
        "**Vocabulary parallel**, with layers that are fully sharded, moves hidden "
        f"states in the place of the weight: those of {_others(divided):,} tokens of a "
        f"host's other devices, where the weight has {classes:,} rows of the same "
        f"width. A device sends {gigabytes(_sent(divided))} GB instead of "
        f"{gigabytes(_sent(own))}, of which {gigabytes(_away(divided))} instead of "
        f"{gigabytes(_away(own))} leave the host ({own.case.devices} devices), and has "
        f"{gib(divided.temporary_bytes)} GiB of temporaries instead of "
        f"{gib(own.temporary_bytes)}."
    )
    both, alone = found.both, found.transposed
    if both is not None and alone is not None:
        text += (
            " Where the devices of a host share a sequence, these tokens are only "
            f"{_others(both):,}: {gigabytes(_sent(both))} GB instead of "
            f"{gigabytes(_sent(alone))}, and {gib(both.temporary_bytes)} GiB instead "
            f"of {gib(alone.temporary_bytes)}."
        )
    yield text


def _sequence(found: _Found) -> Iterator[str]:
    ring, transposed, own = found.ring, found.transposed, found.sharded
    if ring is None or transposed is None or own is None:
        return
    yield (
        "**A divided sequence** is for batches with fewer sequences than devices, and "
        f"for sequences that one device cannot hold: with {ring.tokens:,} tokens on "
        f"each of {own.case.devices} devices temporaries are "
        f"{gib(transposed.temporary_bytes)} GiB (all to all) and "
        f"{gib(ring.temporary_bytes)} GiB (ring), and {gib(own.temporary_bytes)} GiB "
        "with a whole sequence. But fewer tokens stand against the same parameters: "
        f"exchanges take {share(transposed, GPUS):.0%} and {share(ring, GPUS):.0%} of "
        f"the time of the products on {GPUS.name}, where they took "
        f"{share(own, GPUS):.0%}. Divide within a host, and by no more than you must."
    )
    moved = _of_kind(ring, "collective-permute")
    # Both exchange the same for the embedding.
    exchanged = _of_kind(transposed, "all-to-all") - _of_kind(ring, "all-to-all")
    more = _relative(ring.flops, transposed.flops)
    yield (
        "**Ring or all to all**: for attention under a causal mask the ring sends "
        f"{gigabytes(moved)} GB, all to all {gigabytes(exchanged)} GB. All to all "
        "gives each device its heads of the whole sequence; the ring's busiest device, "
        f"with the end of the sequence, does {more} flops, and its program holds "
        f"{ring.kernels} kernels where the other holds {transposed.kernels}. The ring "
        "needs no number of heads, and moves nothing that a local mask leaves out."
    )


def _fits(outcome: Outcome, machine: Machine) -> str:
    does = "fits" if outcome.memory <= machine.memory else "does not fit"
    return f"it {does} the {gib(machine.memory)} GiB of one {machine.name}"


def _others(outcome: Outcome) -> int:
    return outcome.tokens * (outcome.case.host - 1)


def _sent(outcome: Outcome) -> int:
    return sum(each.sent for each in outcome.collectives)


def _away(outcome: Outcome) -> int:
    return sum(each.sent_between_hosts for each in outcome.collectives)


def _of_kind(outcome: Outcome, kind: str) -> int:
    return sum(each.sent for each in outcome.collectives if each.kind == kind)


def _relative(number: float, other: float) -> str:
    change = number / other - 1
    return f"{abs(change):.0%} {'more' if change > 0 else 'fewer'}"


def _listed(items: list[str]) -> str:
    *most, last = items
    return f"{', '.join(most)} and {last}" if most else last

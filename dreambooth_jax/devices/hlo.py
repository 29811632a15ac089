"""Optimized HLO as the compiler prints it: what it says of collectives, kernels and cycles."""

import math
import re


def cycles(hlo: str) -> int:
    """Sum of the compiler's cycle estimates of all instructions."""
    return sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', hlo)))


_ATTENTION = re.compile(r"%splash_mha_(?P<pass>fwd|dkv)\S* = .*operand_layout_constraints=(?P<operands>.*)")
# [subjects, batch, heads, length, width]; one subject's have no axis of subjects.
_TENSOR = re.compile(r"\b(?:bf16|f32)\[((?:\d+,){2,3})(\d+),(\d+)\]")
# Matrix products of queries, keys and width. Forward: scores and values. Backward: scores again and four gradients.
_PRODUCTS = {"fwd": 2, "dkv": 5}


def attention_flops(hlo: str) -> float:
    """FLOPs of the splash attention kernels in optimized HLO, on padded heads."""
    total = 0
    for match in _ATTENTION.finditer(hlo):
        (leading, queries, width), (_, keys, _) = _TENSOR.findall(match["operands"])[:2]
        heads = math.prod(int(size) for size in leading.split(",") if size)  # of all examples
        total += _PRODUCTS[match["pass"]] * 2 * heads * int(queries) * int(keys) * int(width)
    return float(total)


_COLLECTIVE = re.compile(
    r"= (?P<result>\(?(?:/\*index=\d+\*/|[^=])*?) "  # long tuples number their elements
    r"(?P<kind>all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?P<start>-start)?\((?P<rest>.*)"
)
# Two groups of four: replica_groups=[2,4]<=[8], or {{0,1,2,3},{4,5,6,7}}, or mesh['a'=2,'b'=4] {'b'}, where 'b':(1)2
# is part of an axis, of size 2. libtpu 0.0.42 puts the order of the devices between the mesh and its axes.
_GROUPS = re.compile(
    r"replica_groups=(?:\[\d+,(?P<size>\d+)\]|\{\{(?P<first>[\d,]*)\}"
    r"|mesh\[(?P<mesh>[^\]]*)\](?:, device_ids=\([^{]*\))? \{(?P<axes>[^}]*)\})"
)
_CHANNEL = re.compile(r"channel_id=(\d+)")
_ARRAY = re.compile(r"\b(pred|[suf]\d+|bf16)\[([\d,]*)\]")


def collectives(hlo: str) -> dict[str, tuple[int, int]]:
    """Collectives in optimized HLO: kind -> (number, bytes that one device receives).

    With g devices in a group and a result of s bytes, a device receives (g - 1) / g s in an all-gather, (g - 1) s in a
    reduce-scatter, and 2 (g - 1) / g s in an all-reduce, which is both. TPUs print a reduce-scatter as a fusion of that
    name, which holds an all-reduce and a slice; and one collective in each of the fusions that it runs beside, with the
    same channel.
    """
    found: dict[str, list[float]] = {}
    channels: set[str] = set()
    fused = False
    for line in hlo.splitlines():
        if line.endswith("{"):
            fused = line.lstrip().startswith("%all-reduce-scatter")
        match = _COLLECTIVE.search(line)
        if not match:
            continue
        if channel := _CHANNEL.search(match["rest"]):
            if channel[1] in channels:
                continue
            channels.add(channel[1])
        sizes = [_bytes_of(kind, dims) for kind, dims in _ARRAY.findall(match["result"])]
        # A "-start" returns its operands beside its results; the larger half is what is exchanged.
        size = max(sizes, default=0) if match["start"] else sum(sizes)
        received = size * _received(match["kind"], _group_size(match["rest"]))
        if fused:
            found.setdefault("reduce-scatter", []).append(received / 2)
        else:
            found.setdefault(match["kind"], []).append(received)
    return {kind: (len(sizes), int(sum(sizes))) for kind, sizes in sorted(found.items())}


def _group_size(text: str) -> int | None:
    """Number of devices in a collective's group, or None if the text does not say."""
    groups = _GROUPS.search(text)
    if not groups:
        return None
    if groups["mesh"]:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", groups["mesh"]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", groups["axes"])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    return int(groups["size"]) if groups["size"] else groups["first"].count(",") + 1


def _received(kind: str, group: int | None) -> float:
    """Bytes received for each byte of the result. A group of unknown size counts as a large one."""
    share = 1.0 if group is None else (group - 1) / group
    return {"all-reduce": 2 * share, "reduce-scatter": group - 1 if group else 1.0, "collective-permute": 1.0}.get(
        kind, share
    )


def _bytes_of(kind: str, dims: str) -> int:
    bits = {"pred": 8, "bf16": 16}.get(kind) or int(kind[1:])
    return math.prod(int(d) for d in dims.split(",") if d) * bits // 8

"""Planning: what the TPU compiler says of the programs that `train` runs, for machines that are not there."""

import argparse
import contextlib
import dataclasses
import io
import json
import math
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding
from ml_collections import ConfigDict
from support.cascade_folders import write_stage_i
from support.runs import config_of

from dreambooth_jax import plan as plan_command
from dreambooth_jax.devices import chips, tpu
from dreambooth_jax.devices.sharding import make_mesh
from dreambooth_jax.families.frozen_text import lower_encoding
from dreambooth_jax.families.pipeline import describe_base
from dreambooth_jax.models.params import functional
from dreambooth_jax.models.unet import FeedForward
from dreambooth_jax.runs import config_file, protocol_cost, protocol_plan, together
from dreambooth_jax.runs import slices as plan
from dreambooth_jax.runs.config import ConfigError, check_config
from dreambooth_jax.runs.effects import check_effects
from dreambooth_jax.runs.job import (
    argument_shapes,
    data_shapes,
    key_shape,
    lower_steps,
    make_job,
    split_shapes,
    state_shapes,
)

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def config(micro, tmp_path_factory):
    return config_of(tmp_path_factory.mktemp("plan") / "run", base=micro, batch_size=8, mesh_fsdp=4, dtype="bfloat16")


@pytest.fixture(scope="module")
def planned(config):
    """One small plan for eight chips."""
    return plan.plan(config, "v5e:2x4")


def test_a_small_run_fits_eight_chips(planned, config):
    assert planned.fits and planned.devices == 8
    cost = planned.cost
    # Parameters are held a quarter each; what is trained, which is not all, has two moments and an average.
    whole = sum(x.size * 4 for x in describe_base(config.base).shapes.values())
    assert whole / 4 < planned.parameters < whole
    assert planned.parameters < planned.optimizer_state < 3.1 * planned.parameters
    assert cost.arguments >= planned.parameters + planned.optimizer_state
    assert cost.peak >= cost.arguments + cost.temporaries
    assert cost.flops > 0 and cost.seconds > 0 and cost.bound in ("compute", "HBM", "interconnect")
    assert planned.run_seconds(config) > config.steps * cost.seconds


def test_it_counts_what_the_chips_exchange(planned):
    """Split weights are gathered, and their gradients summed up, every step."""
    exchanged = planned.cost.collectives
    assert exchanged.keys() & {"all-gather", "all-reduce", "reduce-scatter"}
    assert all(count > 0 and size > 0 for count, size in exchanged.values())


def test_the_planned_program_is_the_one_that_runs(config):
    """`train` lowers arrays, `plan` shapes: the same text comes of it."""
    pipeline = describe_base(config.base, dtype=jnp.dtype(config.dtype))
    job = make_job(config, pipeline, make_mesh(2, 4))
    trainable, frozen = split_shapes(job)
    state, data, key = state_shapes(job, trainable), data_shapes(job, 5, 10), key_shape(job)

    def arrays(tree):
        return jax.tree.map(lambda x: jax.device_put(jnp.zeros(x.shape, x.dtype), x.sharding), tree)

    real_key = jax.device_put(jax.random.key(0), key.sharding)
    from_shapes = lower_steps(job, state, frozen, data, key).as_text()
    assert lower_steps(job, arrays(state), arrays(frozen), arrays(data), real_key).as_text() == from_shapes


def test_what_does_not_fit_is_said_with_the_amount(config):
    """Ten million resident class images: 40 GiB on a chip of 16."""
    large = config.copy_and_resolve_references()
    large.num_class_images = 10_000_000
    found = plan.plan(large, "v5e:2x4")
    assert not found.fits
    assert 2**30 < found.missing < 2**40
    assert "NO" in plan.describe(found, large) and "GiB too much" in plan.describe(found, large)
    json.dumps(plan.as_json(found, large))


def test_remedies_are_compiled_until_one_fits(config, planned, monkeypatch):
    tried = []

    def fake(changed, topology, class_images):
        tried.append((changed.remat, changed.mesh_fsdp, changed.moment_dtype))
        cost = None if len(tried) < 3 else planned.cost
        return plan.Plan(topology, 8, chips.CHIPS["v5e"], 0, 0, 0, cost, 1, None, 0.0)

    monkeypatch.setattr(plan, "plan", fake)
    names = [name for name, _ in plan.advise(config, "v5e:2x4")]
    assert tried == [("layers", 4, "float32"), ("layers", -1, "float32"), ("layers", -1, "bfloat16")]
    assert names[-1] == "remat=layers, mesh_fsdp=-1, mesh_data=1, moment_dtype=bfloat16"


@pytest.mark.parametrize(
    ("fields", "last"),
    [
        ({}, "frozen_dtype=int8"),
        ({"optimizer": "muon"}, "frozen_dtype=int8"),
        ({"optimizer": "adafactor"}, "frozen_dtype=int8"),
        ({"method": "lora"}, "frozen_dtype=int8"),
        ({"method": "lokr", "optimizer": "muon"}, "frozen_dtype=int8"),
        ({"method": "inversion"}, "frozen_dtype=int8"),
    ],
)
def test_every_remedy_is_a_run_of_its_own(config, planned, fields, last, monkeypatch):
    """None is a setting without effect, an impossible run, or a method that trains more."""
    seen = []

    def fake(changed, topology, class_images):
        check_config(changed)
        seen.append(changed)
        return plan.Plan(topology, 1, chips.CHIPS["v5e"], 0, 0, 0, None, 1, None, 0.0)

    monkeypatch.setattr(plan, "plan", fake)
    start = ConfigDict(dict(config) | fields | {"mesh_fsdp": 1})
    names = [name for name, _ in plan.advise(start, "v5e:1x1")]
    assert names[-1].endswith(last) and len(names) == len(seen) == len({changed.to_json() for changed in seen})
    for changed in seen:
        check_effects(changed, start)
    if "method" in fields:
        assert {changed.method for changed in seen} == {fields["method"]}
    if fields.get("optimizer") == "muon":
        assert not any(changed.moment_dtype == "int8" for changed in seen)


def test_a_lora_of_stable_diffusion_holds_little():
    """The real size, by shapes; the compiler's answer is in benchmarks/RESULTS.md."""
    config = runpy.run_path(str(ROOT / "configs" / "dog.py"))["get_config"]("sd15,lora")
    assert config.prior_preservation and config.train_text_encoder and config.optimizer == "adamw"
    mesh = make_mesh(devices=tpu.devices_of("v5e:1x1"))
    job = make_job(config, describe_base(config.base, dtype=jnp.bfloat16), mesh)
    state, frozen, _, _ = argument_shapes(job, 5)
    assert tpu.shard_bytes(state.opt_state) / 8 < 1e7  # two moments of four bytes
    assert tpu.shard_bytes(state) + tpu.shard_bytes(frozen) < 3e9


@pytest.mark.parametrize("quick", [True, False])
def test_wide_products_stay_whole(quick):
    """On v6e the compiler would cut the feed-forward of eight large images into loops, which it cannot lower when
    quick, nor print otherwise."""
    layer = functional(lambda rngs: FeedForward(320, dtype=jnp.bfloat16, rngs=rngs))
    place = SingleDeviceSharding(tpu.devices_of("v6e:1x1")[0])
    x = jax.ShapeDtypeStruct((8, 4096, 320), jnp.bfloat16)
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), (layer.shapes, x))
    out = jax.checkpoint(layer.apply)
    gradient = jax.grad(lambda params, x: jnp.square(out(params, x).astype(jnp.float32)).sum(), (0, 1))
    lowered = jax.jit(gradient).lower(*arguments)
    cost = tpu.compile_for(chips.CHIPS["v6e"], lowered, quick=quick)
    assert "while(" not in cost.hlo


def test_a_sweep_compares_slices_and_settings(config, monkeypatch, capsys):
    monkeypatch.setattr(plan, "SWEEP_TOPOLOGIES", ("v5e:2x2",))
    plan.print_sweep(ConfigDict(dict(config) | {"prior_preservation": False, "sample_prompts": ()}))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[2:]]
    slices = [("v5e:2x2", "fsdp 1, batch 8"), ("v5e:2x2", "fsdp 4, batch 8")]
    assert [tuple(row[:2]) for row in rows] == slices
    assert all(row[3] == "yes" and float(row[2]) > 0 and float(row[5]) > 0 for row in rows)


def test_text_and_json_say_the_same(planned, config):
    text, values = plan.describe(planned, config), plan.as_json(planned, config)
    assert f"{planned.cost.peak / 2**30:.2f} GiB of 15.75: fits" in text
    assert f"sheets: peak {planned.sheets_peak / 2**30:.2f} GiB beside the optimizer: fit" in text
    assert planned.sheets_peak == planned.painting.peak + planned.optimizer_state + planned.data
    assert json.loads(json.dumps(values))["cost"]["peak"] == planned.cost.peak
    assert values["fits"] is True and values["run_seconds"] == planned.run_seconds(config)
    without = dataclasses.replace(planned, painting=None, painting_missing=3 * 2**29)
    assert "painting: does NOT fit: 1.50 GiB too much" in plan.describe(without, config) and not without.fits


def test_the_encoding_of_prompts_is_planned_where_it_comes_first(planned, config, tmp_path):
    """T5 is on the devices before anything else is: its program may be the one that does not fit."""
    assert planned.text is None
    pipeline = write_stage_i(tmp_path) and describe_base(str(tmp_path), dtype=jnp.bfloat16)
    chip, devices = chips.CHIPS["v5e"], tpu.devices_of("v5e:2x4")
    with tpu.for_absent_devices():
        whole, text = (tpu.compile_for(chip, lower_encoding(pipeline, make_mesh(-1, n, devices))) for n in (1, 4))
    assert text.arguments < whole.arguments and "all-gather" in text.collectives and not whole.collectives
    found = dataclasses.replace(planned, text=text)
    assert f"prompts: 4 in {text.seconds * 1e3:.0f} ms, peak" in plan.describe(found, config) and found.fits
    assert json.dumps(plan.as_json(found, config))
    without = dataclasses.replace(planned, text_missing=3 * 2**29)
    assert "prompts: do NOT fit: 1.50 GiB too much" in plan.describe(without, config)
    assert not without.fits and without.excess == 3 * 2**29


def test_a_run_fits_only_if_its_sheets_do(planned, config):
    tight = dataclasses.replace(planned, optimizer_state=planned.chip.hbm)
    assert not tight.fits and tight.excess == tight.painting.peak + tight.data
    assert "beside the optimizer: do NOT fit" in plan.describe(tight, config)
    assert dataclasses.replace(tight, sheet_batches=0).fits


def test_a_run_takes_the_time_of_all_its_pictures(planned, config):
    """Class images, three sheets of four pictures, and the base's two; two at once on eight chips are one batch."""
    job = make_job(config, describe_base(config.base), make_mesh(1, 1, jax.devices()[:1]))
    assert job.config.class_batch_size == 2 and plan.painted_batches(job) == (5, 1 + 3 * 2)
    painted = planned.class_batches + planned.sheet_batches
    steps = config.steps * planned.cost.seconds
    assert painted > 1 and planned.run_seconds(config) == pytest.approx(steps + painted * planned.painting_seconds)


@pytest.mark.parametrize(("decoding_of_two", "decoded"), [(0.6, 0.6), (0.3, 0.6)])
def test_painting_takes_the_sum_of_its_parts(config, monkeypatch, decoding_of_two, decoded):
    """Of two pictures on one chip, whether the decoder takes both at once or (counted once) one after the other."""
    job = make_job(config, describe_base(config.base), make_mesh(1, 1, jax.devices()[:1]))
    seconds = {"whole": decoding_of_two + 0.1, 2: decoding_of_two, 1: 0.3}
    costs = {name: dataclasses.replace(EMPTY, roofline_seconds=value) for name, value in seconds.items()}
    monkeypatch.setattr(plan, "lower_painting", lambda job: "whole")
    monkeypatch.setattr(plan, "lower_ends", lambda job, batch_size: batch_size)
    monkeypatch.setattr(plan, "compile_for", lambda chip, lowered, quick: costs[lowered])
    assert plan.painting_cost(job, chips.CHIPS["v5e"])[1] == pytest.approx(decoded + config.sampling_steps * 0.1)


@pytest.mark.parametrize("prior", [True, False])
def test_reused_features_shorten_sheets_and_not_class_images(config, monkeypatch, prior):
    """Five steps, the whole model at the first and the fourth: two passes of the loop, and five for a class image."""
    own = config.copy_and_resolve_references()
    own.update(sampling_steps=5, reuse_features=3, prior_preservation=prior)
    job = make_job(own, describe_base(config.base), make_mesh(1, 1, jax.devices()[:1]))
    seconds = {3: 0.6 + 0.2, 1: 0.6 + 0.1, "ends": 0.6}  # the loop's body of three steps, of one; text and decoder
    costs = {name: dataclasses.replace(EMPTY, roofline_seconds=value) for name, value in seconds.items()}
    monkeypatch.setattr(plan, "lower_painting", lambda job: job.config.reuse_features)
    monkeypatch.setattr(plan, "lower_ends", lambda job, batch_size: "ends")
    monkeypatch.setattr(plan, "compile_for", lambda chip, lowered, quick: costs[lowered])
    _, sheet, class_images = plan.painting_costs(job, chips.CHIPS["v5e"])
    decoded = 0.6 * job.config.class_batch_size  # one after the other: as long for one as for all
    assert sheet == pytest.approx(decoded + 2 * 0.2)
    assert class_images == pytest.approx(decoded + 5 * 0.1 if prior else sheet)


EMPTY = tpu.Cost(0, 0, 0, 0.0, 0.0, {}, 0.0, 0.0, 0.0, 0.0, None, 0.0, 0.0, "")


@pytest.mark.parametrize("topology", plan.SWEEP_TOPOLOGIES)
def test_every_slice_of_the_sweep_makes_a_mesh_of_its_chips(topology):
    chips = math.prod(map(int, topology.partition(":")[2].split("x")))
    assert make_mesh(1, -1, tpu.devices_of(topology)).size == chips


@pytest.mark.parametrize(
    "topology", ["v9:2x4", "tpu", "v5e:3x17", "v5e:0x0", "v5e:2x2x1", "v4:2x2", "v5e:64x64", "v5e:-1x2", "v5p:"]
)
def test_unknown_slices_are_refused(topology):
    with contextlib.redirect_stderr(io.StringIO()), pytest.raises(ValueError, match=r"topology = .*such as v"):
        tpu.devices_of(topology)


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        ("RESOURCE_EXHAUSTED: Used 20.45G of 15.75G hbm. Exceeded hbm capacity by 4.70G.", 4.7),
        ("the total memory required for HLO temporaries (40.00G) exceeds available HBM (15.75G).", 24.25),
    ],
)
def test_what_is_missing_is_read_from_the_compilers_message(message, gib):
    assert tpu.missing_bytes(message) == pytest.approx(gib * 2**30, rel=1e-6)


def test_a_peak_above_the_memory_does_not_fit():
    """Whatever the compiler, which knows the chip's own memory, lets pass."""
    place = SingleDeviceSharding(tpu.devices_of("v5e:1x1")[0])
    x = jax.ShapeDtypeStruct((1024, 1024), jnp.float32, sharding=place)
    lowered = jax.jit(lambda x: x @ x).lower(x)
    chip = chips.CHIPS["v5e"]
    peak = tpu.compile_for(chip, lowered, quick=True).peak
    assert peak > 2 * 4 * 1024**2
    with pytest.raises(tpu.OutOfMemory) as raised:
        tpu.compile_for(dataclasses.replace(chip, hbm=peak - 1000), lowered, quick=True)
    assert raised.value.missing == 1000


def test_a_plan_prints_itself_alone_and_leaves_no_programs(micro, tmp_path):
    """Neither complaints of libtpu about a machine without TPU, nor programs that no later plan could read again."""
    command = [sys.executable, "-m", "dreambooth_jax.plan", "--config", "configs/dog.py", "--topology", "v5e:1x1"]
    fields = [f"--config.base={micro}", "--config.resolution=32", "--config.prior_preservation=False"]
    fields.append("--config.sample_prompts=()")
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    environment |= {"JAX_COMPILATION_CACHE_DIR": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    done = subprocess.run([*command, *fields], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and "fits" in done.stdout
    assert not list(tmp_path.glob("jit_run-*"))  # the training program


def test_the_whole_protocol_is_priced(micro, planned, monkeypatch, tmp_path, capsys):
    """Hours of all subjects: each trained, painted and scored; class images once per noun."""
    monkeypatch.setattr(plan, "plan", lambda *_, **__: planned)
    fields = {"dataset": "examples/subjects", "judge": "embedded", "train.base": micro, "train.steps": 40}
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    command = ["--config", "configs/protocol.py", "--protocol", "--topology", "v5e:2x4", "--chip_hour_price", "2"]
    plan_command.main([*command, *flags])
    lines = dict(line.strip().split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["subjects"] == "6 of 6 class nouns, 132 pictures each"  # 25 prompts x 4, and 2 x 16 of the class
    ends = (" hours", " chip h", " at 2")
    hours, chip_hours, price = (float(lines["in all"].split(end)[0].split()[-1]) for end in ends)
    assert chip_hours == pytest.approx(8 * hours, abs=0.1) and price == pytest.approx(2 * chip_hours, abs=0.2)


@pytest.fixture(scope="module")
def crowd(micro, tmp_path_factory):
    """(config, a small plan of sixteen subjects on eight chips)."""
    config = config_of(tmp_path_factory.mktemp("crowd") / "run", base=micro, dtype="bfloat16", method="lora")
    return config, together.together(config, "v5e:2x4", 16)


def test_the_protocol_in_groups_is_priced(micro, crowd, monkeypatch):
    """Six subjects in one group: the steps of the group, not of each of them."""
    monkeypatch.setattr(together, "together", lambda *_, **__: crowd[1])
    config = config_file.load("configs/protocol.py:tiny,lora")
    config.update(judge="embedded", at_once=6)
    config.train.update(base=micro, steps=3_000_000, train_text_encoder=False)
    options = argparse.Namespace(topology="v5e:2x4", full=False, chip_hour_price=0.0)
    said = protocol_plan.plan_protocol(config, options)
    time, unit = re.search(r"training: ([\d.]+) (h|min) for 6 x 3000000 steps", said).groups()
    seconds = float(time) * {"h": 3600, "min": 60}[unit]
    assert seconds == pytest.approx(3_000_000 * crowd[1].cost.seconds, rel=0.01, abs=6)
    monkeypatch.setattr(together, "together", lambda *_, **__: dataclasses.replace(crowd[1], cost=None, missing=2**30))
    with pytest.raises(ValueError, match=r"training of 6 subjects at once does not fit v5e:2x4: 1\.00 GiB .* lower"):
        protocol_plan.plan_protocol(config, options)


def test_the_protocol_of_a_cascade_is_the_sum_of_its_stages(monkeypatch):
    """6 subjects x (1 + 2) minutes; 6 nouns x 20 s; 6 x 132 pictures of 0.2 s."""
    chip = chips.CHIPS["v5e"]

    def stage(own: ConfigDict, topology: str, quick: bool) -> protocol_plan._Part:
        assert own.base == f"tiny_stage{own.stage}"
        return protocol_plan._Part(60.0 * own.stage, class_images=10.0, picture=0.1, chip=chip, chips=1)

    monkeypatch.setattr(protocol_plan, "_subject", stage)
    monkeypatch.setattr(protocol_cost, "scoring_seconds", lambda *_, **__: 60.0)
    options = argparse.Namespace(topology="v5e:1x1", full=False, chip_hour_price=0.0)
    said = protocol_plan.plan_protocol(config_file.load("configs/protocol.py:tiny_cascade"), options)
    assert "18.0 min for 6 x (400 + 200) steps" in said and "2.0 min for 6 nouns" in said
    assert "2.6 min for 792 pictures" in said and "6.0 min" in said


def test_subjects_together_exchange_metrics_alone(crowd):
    config, found = crowd
    assert (found.each, found.devices, found.alone.devices) == (2, 8, 1)
    assert found.cost.collectives.keys() <= {"all-gather"}
    assert sum(size for _, size in found.cost.collectives.values()) <= 4 * 4 * 16 * config.steps_per_call
    assert found.held < found.cost.arguments < found.cost.peak
    assert found.ratio == pytest.approx(found.cost.seconds / 2 / found.alone.cost.seconds)
    # Ten class images, four at once; a sheet of four pictures for each of sixteen subjects.
    assert found.at_once == 4 and found.batches == (3, 16)
    assert found.run_seconds == pytest.approx(60 * found.cost.seconds + 19 * found.painting_seconds)
    assert json.loads(json.dumps(together.as_json(found)))["crowd"] == {"subjects": 16, "nouns": 1}


def test_the_price_of_subjects_together(crowd, micro, monkeypatch, capsys):
    _, found = crowd
    monkeypatch.setattr(together, "together", lambda *_, **__: found)
    command = ["--config", "configs/dog.py:tiny,lora", f"--config.base={micro}", "--topology", "v5e:2x4"]
    plan_command.main([*command, "--subjects", "16", "--chip_hour_price", "3e6"])
    said = capsys.readouterr().out.partition("Together\n")[2]
    lines = dict(line.strip().split(": ", 1) for line in said.splitlines())
    assert lines["subjects"] == "16 of 1 class noun on v5e:2x4, 2 a chip"
    assert lines["peak"].endswith(f"about {found.most} a chip fit, by a line through 1 and 2")
    whole, each = (float(lines[name].split(" at ")[0].split()[-1]) for name in ("all", "a subject"))
    assert whole == pytest.approx(16 * each, rel=0.01)
    assert whole == pytest.approx(8 * found.run_seconds / 3600 * 3e6, rel=0.01)


def test_how_many_subjects_fit_is_a_line_through_two_compiles(crowd):
    _, found = crowd
    hbm = found.chip.hbm
    tight = dataclasses.replace(found, cost=None, missing=2**30, other=(1, hbm - 2**30))
    assert tight.most == 1
    assert "NO: 1.00 GiB too much; about 1 a chip fit" in together.describe(tight, crowd[0], 0.0)
    assert dataclasses.replace(tight, missing=0).most is None
    five = dataclasses.replace(
        found, cost=dataclasses.replace(found.cost, peak=hbm - 7 * 2**29), other=(1, hbm - 2**32)
    )
    assert five.most == 2 + 7  # half a GiB each


def test_methods_without_a_frozen_base_are_not_planned_together(config):
    with pytest.raises(ConfigError, match="many subjects share a frozen base"):
        together.together(config, "v5e:2x4", 16)


@pytest.mark.parametrize(("stage", "expected"), [(0, [1, 2]), (2, [2])])
def test_every_stage_of_a_cascade_is_planned(tmp_path, stage, expected, monkeypatch, capsys):
    monkeypatch.setattr(plan, "print_plan", lambda config, options: print(config.workdir))
    config = config_of(tmp_path, stages=("tiny",), stage=stage)
    plan_command.run(config, argparse.Namespace(protocol=False, subjects=0, sweep=False, json=False))
    lines = [line for n in expected for line in (f"Stage {n} of 2: tiny", f"{tmp_path}/stage{n}")]
    assert capsys.readouterr().out.splitlines() == lines

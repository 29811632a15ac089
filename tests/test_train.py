"""The pieces of a training run: what is refused and when, what is saved, what the loop promises."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from PIL import Image
from support.runs import assert_same_state, checkpoints, config_of, finish, get_config, log_of, read_state, start, wait

from dreambooth_jax.devices.sharding import make_mesh, state_shardings
from dreambooth_jax.diffusion.step import Metrics, TrainState, init_state
from dreambooth_jax.families.pipeline import load_pipeline, read_params
from dreambooth_jax.runs import checkpoint
from dreambooth_jax.runs.config import ConfigError, check_config
from dreambooth_jax.runs.loop import Progress, Sheets, Store, is_painted, loop
from dreambooth_jax.runs.plan_text import check_space, plan_text
from dreambooth_jax.runs.preemption import Preemption
from dreambooth_jax.runs.report import NonFiniteLoss, Reporter
from dreambooth_jax.runs.setup import set_up, start_state
from dreambooth_jax.runs.training import train
from dreambooth_jax.runs.workdir import open_run


def read_nothing(*_):
    """Whoever reads weights now is too early."""
    pytest.fail("weights are read")


def run(config, devices=None, **collaborators) -> None:
    with Preemption() as guard:
        train(set_up(config, devices), guard, **{"read": read_nothing} | collaborators)


def edit_config(workdir, **fields) -> None:
    """Makes a run look as if it had been trained with these fields, and on whatever data."""
    for record in (workdir / "checkpoints").glob("*/run.json"):
        found = json.loads(record.read_text())
        record.write_text(json.dumps(found | {"config": found["config"] | fields, "fingerprints": {}}))


# --- what is refused


def test_every_wrong_field_is_named_at_once(tmp_path):
    config = config_of(tmp_path / "run", base="/nowhere", steps=0, crop="middle", ema_decay=1.0, learning_rate=-1.0)
    del config.seed
    config.stepz = 3
    with config.ignore_type():
        config.flip, config.batch_size, config.identifier = "yes", 1.5, " "
    with pytest.raises(ConfigError) as error:
        set_up(config)
    lines = str(error.value).splitlines()[1:]
    expected = {
        "stepz": "unknown",
        "seed": "missing",
        "steps": "above 0",
        "crop": "center, random",
        "ema_decay": "below 1",
        "learning_rate": "above 0",
        "flip": "bool",
        "batch_size": "int",
        "identifier": "not empty",
    }
    assert len(lines) == len(expected)
    for name, reason in expected.items():
        assert any(line.strip().startswith(name) and reason in line for line in lines), name
    assert not (tmp_path / "run").exists()


def test_fields_that_contradict_each_other_are_named_at_once(tmp_path):
    prompts = ("a {identifier}", "a {subject}", "{", "{identifier.x}")
    config = config_of(tmp_path, batch_size=4, accumulate=3, lr_warmup_steps=60, sample_prompts=prompts)
    with pytest.raises(ConfigError) as error:
        check_config(config)
    assert len(str(error.value).splitlines()) == 1 + 5
    for name in ("accumulate = 3", "lr_warmup_steps = 60", *(f"sample_prompts[{i}]" for i in (1, 2, 3))):
        assert name in str(error.value)


@pytest.mark.parametrize("base", ["tiny", "tiny_stage1", "tiny_cascade", "sd14", "sd15", "sd21"])
def test_the_shipped_configs_pass(base):
    check_config(get_config(base))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"base": "./no-such-base"}, r"no-such-base.*no such folder"),
        ({"resolution": 17}, r"resolution = 17.*multiple of 2; nearest: 16, 18"),
        ({"sampling_steps": 1001}, r"1001 sampling steps: expected .* 1000"),
        ({"mesh_data": 3, "mesh_fsdp": 1}, r"does not cover 8 devices"),
        ({"instance_images": "/no/such/photos"}, r"No image folder /no/such/photos"),
    ],
)
def test_what_does_not_fit_is_refused_before_weights_are_read(micro, tmp_path, fields, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(config_of(tmp_path / "run", **{"base": micro} | fields))


@pytest.mark.parametrize("field", ["instance_images", "class_images"])
def test_bad_images_are_listed_before_weights_are_read(micro, tmp_path, field):
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.new("RGB", (32, 32)).save(folder / "good.png")
    (folder / "cut.png").write_bytes((folder / "good.png").read_bytes()[:60])
    (folder / "empty.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"(?s)2 of 3 images.*cut\.png.*empty\.jpg"):
        run(config_of(tmp_path / "run", base=micro, **{field: str(folder)}))


def test_class_images_of_another_prompt_are_not_used(micro, finished, tmp_path):
    shutil.copytree(finished / "class_images", tmp_path / "run" / "class_images")
    with pytest.raises(ValueError, match=r"prompt than 'a photo of cat'.*: class_00000\.png of 'a photo of dog'"):
        run(config_of(tmp_path / "run", base=micro, class_noun="cat"))


def test_an_unknown_flag_is_an_error(tmp_path, micro):
    assert "stepz" in finish(tmp_path / "run", code=1, base=micro, stepz=3)


@pytest.mark.parametrize("place", ["file", "file/below", "read-only"])
def test_a_workdir_that_cannot_be_written(micro, tmp_path, place):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "read-only").mkdir(mode=0o500)
    if place == "read-only" and os.access(tmp_path / "read-only", os.W_OK):
        pytest.skip("the superuser writes everywhere")
    with pytest.raises(ConfigError, match=r"workdir = .*cannot be written.*--config\.workdir"):
        run(config_of(tmp_path / place, base=micro))
    assert (tmp_path / "file").read_text() == "kept"


# --- going on


CHANGES = {
    "learning_rate": 1e-3,
    "identifier": "xyz",
    "batch_size": 2,
    "seed": 1,
    "train_text_encoder": False,
    "sampling_steps": 5,
}
HARMLESS = {
    "save_every": 7,
    "keep_last": 2,
    "keep_every": 5,
    "sample_every": 9,
    "sample_prompts": ("a",),
    "sample_count": 1,
    "mesh_fsdp": 2,
    "remat": "layers",
    "steps_per_call": 3,
    "class_batch_size": 2,
    "negative_prompt": "blur",
    "steps": 99,
}


def test_going_on_with_another_config_names_every_field(micro, finished, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "run")
    before = (workdir / "config.json").read_text()
    fields = {"base": micro, "instance_images": "examples/subjects/dog"}
    with pytest.raises(ConfigError) as error:
        set_up(config_of(workdir, **fields, **CHANGES))
    lines = str(error.value).splitlines()[1:]
    assert sorted(line.strip().split(":")[0] for line in lines) == sorted(CHANGES)
    assert "learning_rate: 0.0002 in the checkpoint, 0.001 now" in str(error.value)
    assert (workdir / "config.json").read_text() == before
    assert_same_state(read_state(workdir, 60), read_state(finished, 60))


def test_going_on_with_harmless_changes(micro, finished, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "run")
    config = config_of(workdir, base=micro, instance_images="examples/subjects/dog", **HARMLESS)
    assert set_up(config).config.steps == 99
    edit_config(workdir, lr_schedule="cosine")
    with pytest.raises(ConfigError, match="steps: 60 in the checkpoint, 100 now"):
        config.update(lr_schedule="cosine", steps=100)
        set_up(config)


def test_a_finished_run_reads_no_weights_again(micro, finished, tmp_path, capsys):
    workdir = shutil.copytree(finished, tmp_path / "run")
    run(config_of(workdir, base=micro, instance_images="examples/subjects/dog"))
    assert f"Done. Checkpoint: {workdir}/checkpoints/60" in capsys.readouterr().out


def test_the_plan_says_what_speaks_against_an_identifier(micro, finished, tmp_path):
    assert "the identifier" not in log_of(finished).read_text()
    for identifier, problem in (("unbelievable", "is 12 tokens"), ("a", "is a common word")):
        text = plan_text(set_up(config_of(tmp_path / "run", base=micro, identifier=identifier)), done=0)
        assert f"warning: the identifier {identifier!r} {problem}" in text


# --- checkpoints


def test_an_async_save_holds_the_state_of_its_moment(tmp_path):
    """Steps that donate the saved buffers run on while it is written."""
    optimizer = optax.adam(0.1)
    state = init_state({f"w{i}": jnp.full((256, 1024), float(i)) for i in range(8)}, optimizer, ema=True)

    advance = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    manager = checkpoint.open_checkpoints(tmp_path, keep_last=9)
    expected = {}
    for number in (3, 6, 9):
        for _ in range(3):
            state = advance(state)
        expected[number] = jax.tree.map(np.array, state)
        checkpoint.save(manager, number, state)
    for _ in range(20):
        state = advance(state)
    manager.wait_until_finished()
    for number, value in expected.items():
        found = checkpoint.restore(manager, value_like(value), number)
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(value), strict=True):
            np.testing.assert_array_equal(one, other)
    manager.close()


def value_like(tree):
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), tree)


def test_a_state_goes_from_mesh_to_mesh(tmp_path):
    names = {"unet.a.kernel": (16, 24), "unet.a.bias": (24,), "unet.b.kernel": (3, 3, 8, 16)}
    params = {n: jax.random.normal(jax.random.key(i), shape) for i, (n, shape) in enumerate(names.items())}
    optimizer = optax.adam(0.1)
    shapes = jax.eval_shape(lambda p: init_state(p, optimizer, ema=True), params)
    meshes = [make_mesh(1, 1, jax.devices()[:1]), make_mesh(2, 4), make_mesh(8, 1), make_mesh(1, 1, jax.devices()[3:4])]
    state = init_state(params, optimizer, ema=True)
    grads = jax.tree.map(jnp.cos, params)
    state = state._replace(opt_state=optimizer.update(grads, state.opt_state, params)[1], step=jnp.asarray(5))
    for number, mesh in enumerate(meshes):
        placed = jax.device_put(state, state_shardings(mesh, params, shapes))
        manager = checkpoint.open_checkpoints(tmp_path / str(number))
        checkpoint.save(manager, 5, placed)
        manager.wait_until_finished()
        for other in meshes:
            shardings = state_shardings(other, params, shapes)
            like = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
            found = checkpoint.restore(manager, like)
            jax.tree.map(np.testing.assert_array_equal, found, state)
            assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s, found, shardings))
        manager.close()


@pytest.mark.slow
def test_a_checkpoint_of_one_device_starts_a_run_on_eight(micro, finished, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "run")
    fields = {"base": micro, "instance_images": "examples/subjects/dog"}
    job = set_up(config_of(workdir, **fields, mesh_data=2, mesh_fsdp=4)).job
    trainable = {n: jnp.zeros(s.shape) for n, s in job.pipeline.shapes.items() if not n.startswith("vae.")}
    manager = checkpoint.open_checkpoints(workdir / "checkpoints")
    state = start_state(job, trainable, manager)
    stored = read_state(finished, 60)
    assert int(state.step) == 60
    for name, value in state.trainable.items():
        np.testing.assert_array_equal(value, stored[f"['trainable']['{name}']"])
        np.testing.assert_array_equal(state.ema[name], stored[f"['ema']['{name}']"])
    assert len({len(value.sharding.device_set) for value in state.trainable.values()}) == 1
    split = [value for value in state.trainable.values() if not value.sharding.is_fully_replicated]
    assert len(split) > 20
    manager.close()


def test_too_little_space_is_an_error_before_training(micro, finished, tmp_path):
    fields = {"base": micro, "instance_images": "examples/subjects/dog", "steps": 70}
    size = sum(value.nbytes for value in read_state(finished, 60).values())
    message = r"the disk has .* GB left .*keep_last, keep_every.*--config\.workdir"
    one = set_up(config_of(shutil.copytree(finished, tmp_path / "one"), **fields, keep_last=1))
    # One checkpoint of the two that exist for a moment is there already.
    check_space(one, stored=1, free=size)
    with pytest.raises(ConfigError, match=message):
        check_space(one, stored=1, free=size - 1)
    three = set_up(config_of(shutil.copytree(finished, tmp_path / "three"), **fields, keep_last=3))
    check_space(three, stored=1, free=3 * size)
    with pytest.raises(ConfigError, match=message):
        check_space(three, stored=1, free=3 * size - 1)
    check_space(three, stored=1)  # of this disk


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system can be mounted by the superuser only")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_fills_up_keeps_the_checkpoint_before(small_disk):
    def state(seed: int) -> TrainState:
        value = jax.random.normal(jax.random.key(seed), (1024, 640))
        return TrainState(jnp.asarray(seed), {"w": value, "v": value + 1}, (), None)  # 5 MB that do not compress

    manager = checkpoint.open_checkpoints(small_disk / "checkpoints")
    checkpoint.save(manager, 1, state(1))
    manager.wait_until_finished()
    with pytest.raises(Exception, match=r"(?i)no space|RESOURCE_EXHAUSTED|ENOSPC") as error:
        checkpoint.save(manager, 2, state(2))
        manager.wait_until_finished()
    assert isinstance(error.value, (OSError, ValueError)), repr(error.value)  # these are told without a traceback
    again = checkpoint.open_checkpoints(small_disk / "checkpoints")
    assert again.latest_step() == 1
    found = checkpoint.restore(again, value_like(state(0)))
    jax.tree.map(np.testing.assert_array_equal, found, state(1))
    assert not [path for path in (small_disk / "checkpoints").iterdir() if "tmp" in path.name]
    again.close()


@pytest.mark.slow
def test_a_disk_that_fills_up_ends_the_run_with_one_line(micro, small_disk, tmp_path):
    workdir, log = small_disk / "run", tmp_path / "full"
    fields = {"steps": 100_000, "save_every": 20, "sample_every": 100_000, "sample_prompts": (), "sample_count": 6}
    process = start(workdir, log=log, base=micro, **fields)
    deadline = time.monotonic() + 200
    while not checkpoints(workdir) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    with contextlib.suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as filler:
        while True:
            filler.write(bytes(4096))
    code, text = wait(process, 60), log_of(log).read_text()
    assert code == 1 and "Traceback" not in text, text[-3000:]
    (line,) = [line for line in text.splitlines() if "error:" in line]
    assert re.search(r"(?i)no space left", line) and "ake room" in line and str(small_disk) in line
    assert checkpoints(workdir)  # the one before


# --- the loop


class FakeRun:
    """A run of which only the loop, the reports and the checkpoints are real; `events` is what happens in it."""

    def __init__(self, tmp_path, **fields):
        self.config = config_of(tmp_path / "run", **fields)
        self.workdir = tmp_path / "run"
        self.workdir.mkdir()
        self.events, self.sheets = [], set()

    def paint(self, state, step):
        self.events.append(("paint", step))
        self.sheets.add(step)

    def loop(self, capacity, losses=lambda step: 1.0, weights=lambda step: float(step)) -> Progress:
        manager = checkpoint.open_checkpoints(self.workdir / "checkpoints", keep_last=9)
        done = manager.latest_step() or 0
        progress = Progress(done, TrainState(jnp.asarray(done), {"w": jnp.asarray([float(done)])}, (), None))
        reporter = Reporter(epath.Path(self.workdir), first_step=done, steps=self.config.steps)
        record, events = reporter.record, self.events
        reporter.record = lambda first, *rest: (events.append(("report", first)), record(first, *rest))
        is_missing = lambda step: step > 0 and step not in self.sheets and is_painted(step, self.config)  # noqa: E731

        def advance(state, count):
            first, count = int(state.step), int(count)
            assert count <= capacity
            events.append(("call", first))
            values = np.array([losses(first + i + 1) for i in range(capacity)])
            step = first + count
            return TrainState(jnp.asarray(step), {"w": jnp.asarray([weights(step)])}, (), None), Metrics(*[values] * 4)

        def save(step, state):
            events.append(("save", step))
            checkpoint.save(manager, step, state)

        with contextlib.closing(manager):
            loop(
                self.config,
                progress,
                advance,
                store=Store(save, lambda: checkpoint.check(manager), lambda: checkpoint.wait(manager)),
                sheets=Sheets(lambda state: None, self.paint, is_missing),
                reporter=reporter,
                guard=Preemption(),
                agree=lambda requested: requested,
            )
        return progress


def test_the_loop_reports_one_call_late_and_stops_where_something_is_due(tmp_path):
    fields = {"steps": 11, "steps_per_call": 3, "save_every": 4, "sample_every": 5}
    run = FakeRun(tmp_path, **fields)
    assert run.loop(capacity=3).step == 11
    assert run.events == [
        ("call", 0),
        ("call", 3),
        ("report", 0),
        ("report", 3),
        ("save", 4),
        ("call", 4),
        ("report", 4),
        ("paint", 5),
        ("call", 5),
        ("report", 5),
        ("save", 8),
        ("call", 8),
        ("report", 8),
        ("paint", 10),
        ("call", 10),
        ("report", 10),
        ("save", 11),
        ("paint", 11),
    ]
    assert checkpoints(run.workdir) == [4, 8, 11]


def test_what_was_saved_but_not_painted_is_painted_at_the_next_start(tmp_path):
    run = FakeRun(tmp_path, steps=4, steps_per_call=2, save_every=2, sample_every=2)
    run.loop(capacity=2)
    shutil.rmtree(run.workdir / "checkpoints" / "4")
    run.sheets = set()
    run.events.clear()
    run.loop(capacity=2)
    assert run.events == [("paint", 2), ("call", 2), ("report", 2), ("save", 4), ("paint", 4)]
    run.events.clear()
    run.loop(capacity=2)
    assert run.events == []


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_is_never_saved(tmp_path, bad):
    run = FakeRun(tmp_path, steps=12, steps_per_call=2, save_every=3, sample_every=12)
    with pytest.raises(NonFiniteLoss, match="step 6"):
        run.loop(capacity=2, losses=lambda step: bad if step >= 6 else 1.0)
    assert checkpoints(run.workdir) == [3]
    assert (run.workdir / "metrics.csv").read_text().splitlines()[-1].startswith("5,")


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    """The loss of a step is of the weights before it, so that it cannot tell."""
    run = FakeRun(tmp_path, steps=12, steps_per_call=3, save_every=3, sample_every=12)
    with pytest.raises(NonFiniteLoss, match="step 6"):
        run.loop(capacity=3, weights=lambda step: np.nan if step == 6 else 1.0)
    assert checkpoints(run.workdir) == [3]


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_command_and_saves_nothing(micro, tmp_path):
    from safetensors.numpy import load_file, save_file

    base = shutil.copytree(micro, tmp_path / "base")
    weights = load_file(base / "vae" / "diffusion_pytorch_model.safetensors")
    weights["encoder.conv_in.bias"][0] = 3e38  # finite, but latents overflow
    save_file(weights, base / "vae" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    workdir = tmp_path / "run"
    log = finish(workdir, code=1, base=str(base), steps=4)
    assert "error: step 1: loss nan" in log and "learning_rate" in log and "Traceback" not in log
    assert not checkpoints(workdir)


# --- real steps


VARIANTS = {
    "bfloat16, remat, no prior": {"dtype": "bfloat16", "remat": "elementwise", "prior_preservation": False},
    "frozen text encoder, adafactor, accumulation, min-SNR": {
        "train_text_encoder": False,
        "optimizer": "adafactor",
        "batch_size": 2,
        "accumulate": 2,
        "snr_gamma": 5.0,
        "lr_schedule": "cosine",
        "lr_warmup_steps": 1,
        "ema_decay": 0.0,
        "sample_prompts": (),
    },
    "moments in eight bits, no prior": {
        "moment_dtype": "int8",
        "second_moment_dtype": "int8",
        "prior_preservation": False,
    },
    "frozen text encoder, Muon, no prior": {
        "optimizer": "muon",
        "moment_dtype": "bfloat16",
        "train_text_encoder": False,
        "prior_preservation": False,
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.slow
def test_variants_train_without_compiling_twice(micro, finished, tmp_path, variant):
    shutil.copytree(finished / "class_images", tmp_path / "run" / "class_images")
    fields = {"steps": 8, "steps_per_call": 1, "save_every": 2, "sample_every": 2, "sample_prompts": ("a dog",)}
    config = config_of(tmp_path / "run", **{"base": micro} | fields | VARIANTS[variant])
    compiles, counts = [], []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiles.append(event) if "backend_compile" in event else None
    )

    def counting(*args, **kw):
        reporter = Reporter(*args, **kw)
        record = reporter.record
        reporter.record = lambda *args: (counts.append(len(compiles)), record(*args))
        return reporter

    run(config, jax.devices()[:1], read=read_params, reporter=counting)
    assert counts[0] > 0 and len(counts) == 8
    assert counts[3] == counts[-1], counts  # by then everything was called once: step, save, picture
    one, other = read_state(tmp_path / "run", 8), open_run(tmp_path / "run", make_mesh(1, 1, jax.devices()[:1]))[2]
    base = read_params(load_pipeline(micro))
    trained = {name.split("'")[3] for name in one if "trainable" in name}
    moved = {name for name in base if not np.array_equal(base[name], other[name])}
    assert {name.split(".")[0] for name in trained} == (
        {"unet"} if "frozen" in variant else {"unet", "text_encoder"}
    )  # nothing frozen is in the checkpoint
    assert moved <= trained and len(moved) > 0.9 * len(trained)
    halves = [name for name, value in one.items() if value.dtype == jnp.bfloat16]
    assert bool(halves) == ("Muon" in variant) and all("'mu'" in name or ".mu" in name for name in halves)


@pytest.mark.slow
def test_the_text_encoder_trains_and_is_used(micro, finished):
    _, pipeline, params = open_run(finished, make_mesh())
    base = read_params(pipeline)
    average = {name.split("'")[3]: value for name, value in read_state(finished, 60).items() if "['ema']" in name}
    assert {name.split(".")[0] for name in average} == {"unet", "text_encoder"}
    for name, value in average.items():
        np.testing.assert_array_equal(params[name], value)
    still = [name for name in average if np.array_equal(average[name], base[name])]
    assert not [name for name in still if "token_embedding" not in name]
    one, other = (
        pipeline.encode_text(weights, pipeline.tokenize(["a sks dog"]))["states"] for weights in (params, base)
    )
    assert np.abs(np.asarray(one) - np.asarray(other)).max() > 1e-3

"""Many subjects in one program: every lane computes what a run of its subject alone does."""

import csv

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.runs import (
    ROOT,
    assert_same_state,
    checkpoints,
    config_of,
    finish,
    get_config,
    kill_when,
    pictures,
    read_state,
    start,
)

from dreambooth_jax import evaluate
from dreambooth_jax.adapters.inversion import TEMPLATES
from dreambooth_jax.adapters.many import (
    Lanes,
    cut_to,
    finished,
    lane,
    over_subjects,
    padded_to,
    stack,
    stacked_data,
)
from dreambooth_jax.data.images import read_examples
from dreambooth_jax.devices import hlo
from dreambooth_jax.devices.sharding import make_mesh
from dreambooth_jax.diffusion.examples import EncodedExamples, Numbers, TrainingData
from dreambooth_jax.diffusion.step import Metrics, TrainState
from dreambooth_jax.families.pipeline import load_pipeline, read_params
from dreambooth_jax.files.lora_read import read_adapter
from dreambooth_jax.runs import many
from dreambooth_jax.runs.config import ConfigError, check_config
from dreambooth_jax.runs.fingerprints import check_same
from dreambooth_jax.runs.job import fresh_state, held, initial, lower_steps, make_job, numbers_of, read_shapes
from dreambooth_jax.runs.lanes import lower_many, many_shapes, subjects_a_device
from dreambooth_jax.runs.many import examples_of, plan_text
from dreambooth_jax.runs.setup import begin
from dreambooth_jax.runs.subjects import read_subjects

FIELDS = {
    "method": "lora",
    "lora_rank": 2,
    "learning_rate": 0.02,
    "batch_size": 2,
    "ema_decay": 0.0,
    "crop": "center",
    "flip": False,
    "views": 1,
    "steps": 4,
}
COUNTS, STOPS, RATES, RANKS = (3, 5), (3, 4), (0.02, 0.005), (2, 1)


def examples(count, seed, text, pipeline):
    mean = jnp.asarray(np.random.default_rng(seed).standard_normal((count, 8 * 8 * 4)), jnp.float32)
    return EncodedExamples(mean, jnp.zeros_like(mean), pipeline.tokenize([text]), jnp.zeros(count, jnp.int32))


@pytest.mark.slow
@pytest.mark.parametrize("frozen_dtype", ["", "int8"])
def test_lane_k_is_the_run_of_subject_k(micro, tmp_path, frozen_dtype):
    pipeline = load_pipeline(micro)
    mesh = make_mesh(1, 1, jax.devices()[:1])
    job, *solo = (
        make_job(config_of(tmp_path, base=micro, frozen_dtype=frozen_dtype, **FIELDS | own), pipeline, mesh)
        for own in ({}, *({"learning_rate": a, "lora_rank": r} for a, r in zip(RATES, RANKS, strict=True)))
    )
    params = held(job, read_params(pipeline, mesh, read_shapes(job)))
    starts = [begin(one, params)[0] for one in solo]
    shapes, (_, frozen, _) = jax.eval_shape(lambda x: x, starts[0]), begin(job, params)
    captions = ("a sks dog", "a ktn dog")
    instances = [examples(count, k, captions[k], pipeline) for k, count in enumerate(COUNTS)]
    prior = examples(4, 9, "a dog", pipeline)
    keys = [jax.random.key(k) for k in range(len(COUNTS))]

    numbers = [numbers_of(one.config) for one in solo]
    data = stacked_data(instances, [prior] * 2, keys, batch_size=2, steps=max(STOPS), numbers=numbers)
    assert data.prior.mean.ndim == 2  # stored once
    states = stack([fresh_state(job, padded_to(shapes, start)) for start in starts])
    scales = jnp.asarray([RANKS[0] / rank for rank in RANKS])
    lanes, stacked_keys = Lanes(data, jnp.asarray(STOPS), scales), jnp.stack(keys)
    run = lower_many(job, states, frozen, lanes, stacked_keys).compile()
    losses = []
    for _ in range(2):
        states, metrics = run(states, frozen, lanes, stacked_keys, jnp.asarray(2, jnp.int32))
        losses.append(np.asarray(metrics.loss[:2]))
    losses = np.concatenate(losses)
    np.testing.assert_array_equal(states.step, STOPS)

    for k, stop in enumerate(STOPS):
        state, alone = fresh_state(solo[k], starts[k]), TrainingData(instances[k], prior)
        steps = lower_steps(solo[k], state, frozen, alone, keys[k]).compile()
        found = []
        for count in (2, stop - 2):
            state, metrics = steps(state, frozen, alone, keys[k], jnp.asarray(count, jnp.int32))
            found.append(np.asarray(metrics.loss[:count]))
        np.testing.assert_allclose(losses[:stop, k], np.concatenate(found), rtol=1e-4)
        own = lane(states.trainable, k)
        cut = cut_to(jax.eval_shape(lambda x: x, starts[k]), own)
        for name, value in state.trainable.items():
            np.testing.assert_allclose(cut[name], value, rtol=1e-3, atol=1e-4, err_msg=name)
            filled = padded_to(jax.eval_shape(lambda x: x, {name: own[name]}), {name: cut[name]})[name]
            np.testing.assert_array_equal(own[name], filled, err_msg=f"{name}: what fills up the rank stays 0")
    assert not np.allclose(losses[:, 0], losses[:, 1])


@pytest.mark.slow
def test_devices_train_their_own_subjects_and_exchange_nothing_but_metrics(micro, tmp_path):
    """Lanes on one device, on eight, and on four by two that share the base; `plan` knows the arguments' shapes."""
    pipeline, count = load_pipeline(micro), 8
    config = config_of(tmp_path, base=micro, **FIELDS)
    prior, found = examples(4, 9, "a dog", pipeline), {}
    instances = [examples(3, k, f"a sks{k} dog", pipeline) for k in range(count)]
    keys = [jax.random.key(k) for k in range(count)]
    for sizes in ((1, 1), (8, 1), (4, 2)):
        mesh = make_mesh(*sizes, jax.devices()[: sizes[0] * sizes[1]])
        job = make_job(config, pipeline, mesh)
        trainable, frozen, _ = begin(job, read_params(pipeline, mesh))
        data = stacked_data(
            instances, [prior] * count, keys, batch_size=2, steps=4, numbers=[numbers_of(config)] * count
        )
        states = jax.jit(lambda x, job=job: stack([initial(job)(x)] * count))(trainable)
        lanes = Lanes(data, jnp.asarray([2, 3] * 4, jnp.int32), jnp.ones(count))
        shapes = many_shapes(job, count, 3)
        given = (states, frozen, lanes, jnp.stack(keys))
        arguments = jax.tree.map(lambda x, shape: jax.device_put(x, shape.sharding), given, shapes)
        lowered = lower_many(job, *arguments)
        assert lower_many(job, *shapes).as_text() == lowered.as_text()
        assert subjects_a_device(mesh, count) == count // mesh.size
        run = lowered.compile()
        exchanged = hlo.collectives(run.as_text())
        states, metrics = run(*arguments, jnp.asarray(3, jnp.int32))
        found[sizes] = (jax.device_get(states), np.asarray(metrics.loss))
        of_metrics = sum(x.nbytes for x in metrics)
        if sizes == (8, 1):
            assert exchanged.keys() == {"all-gather"} and sum(size for _, size in exchanged.values()) <= of_metrics
            assert states.trainable.keys() and all(
                x.sharding.shard_shape(x.shape)[0] == 1 for x in jax.tree.leaves(states)
            )
        if sizes == (4, 2):  # each of two devices has half of the base
            assert exchanged.keys() == {"all-gather"}
            assert sum(size for _, size in exchanged.values()) > of_metrics
    states, losses = found.pop((1, 1))
    np.testing.assert_array_equal(states.step, [2, 3] * 4)
    for other, its_losses in found.values():
        np.testing.assert_array_equal(other.step, states.step)
        np.testing.assert_allclose(its_losses, losses, rtol=1e-4)
        for name, value in states.trainable.items():
            np.testing.assert_allclose(other.trainable[name], value, rtol=1e-3, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("shared", [True, False])
def test_every_lane_reads_its_own_data_and_stops_by_itself(shared):
    """A step that adds up what it is given; class images of one noun, or of two."""
    numbers = [EncodedExamples(*(jnp.full((4, 2), 10.0**k),) * 2, None, jnp.zeros(4, jnp.int32)) for k in range(3)]
    rates = Numbers(*jnp.array([[0.1, 0.2]] * len(Numbers._fields)))
    data = TrainingData(stack(numbers[:2]), numbers[2] if shared else stack(numbers[1:]), None, rates)

    def step(state, frozen, data, key):
        base, scale = frozen
        after = {
            "photos": data.instance.mean.sum() * scale,
            "class": data.prior.mean.sum() * base["weight"],
            "key": key,
        }
        return TrainState(state.step + 1, after, {}, None), Metrics(*[data.numbers.learning_rate] * 4)

    states = TrainState(jnp.array([3, 3]), dict.fromkeys(("photos", "class", "key"), jnp.zeros(2)), {}, None)
    lanes = Lanes(data, jnp.array([3, 4]), jnp.array([1.0, 2.0]))
    run = over_subjects(step, shared_prior=shared)
    states, metrics = run(states, {"weight": jnp.array(0.5)}, lanes, jnp.array([7.0, 8.0]))
    np.testing.assert_array_equal(states.step, [3, 4])  # the first lane has stopped, and changes no more
    wanted = {"photos": [0, 2 * 80], "class": [0, 0.5 * 800], "key": [0, 8]}
    for name, value in wanted.items():
        np.testing.assert_allclose(states.trainable[name], value, err_msg=name)
    np.testing.assert_allclose(metrics.loss, [0.1, 0.2])


def test_shorter_lanes_are_filled_with_rows_that_no_order_names():
    def some(count, captions):
        rows = jnp.arange(count, dtype=jnp.float32)[:, None]
        own = {"sizes": rows + 100}
        return EncodedExamples(rows, rows, jnp.ones((captions, 3)), jnp.zeros(count, jnp.int32), own)

    given, keys = [some(5, 1), some(3, 2)], [jax.random.key(k) for k in range(2)]
    numbers = [Numbers(*[rate] * len(Numbers._fields)) for rate in (0.1, 0.2)]
    data = stacked_data(given, [None, None], keys, batch_size=2, steps=7, numbers=numbers)
    assert data.instance.mean.shape == (2, 16, 1) and data.instance.cond.shape == (2, 16, 3)
    np.testing.assert_allclose(data.numbers.learning_rate, [0.1, 0.2])
    for number, own in enumerate(given):
        stacked = lane(data.instance, number)
        np.testing.assert_array_equal(stacked.mean[: len(own.mean)], own.mean)
        np.testing.assert_array_equal(stacked.of_example["sizes"][: len(own.mean)], own.of_example["sizes"])
        assert int(data.order[number].max()) == len(own.mean) - 1


def test_finished_names_the_subjects_that_reach_their_stop():
    assert finished(2, 4, np.array([2, 3, 4, 5])) == [1, 2]


def table_of(file, cat="cat"):
    """A table of two subjects: the first has two steps, the second so many that it can be killed before its end."""
    photos = ROOT / "examples" / "subjects"
    with file.open("w", newline="") as text:
        writer = csv.writer(text)
        writer.writerow(("name", "photos", "steps", "learning_rate", "lora_rank"))
        writer.writerows([("rex", photos / "dog", 2, 0.02, 1), ("tom", photos / cat, 120, 0.01, 2)])
    return FIELDS | {
        "subjects": str(file),
        "num_class_images": 4,
        "save_every": 20,
        "sample_every": get_config().sample_every,  # it would have no effect
        "sample_count": 2,
        "sample_prompts": ("a {identifier} {class_noun} in the snow",),
    }


@pytest.fixture(scope="module")
def trained(micro, tmp_path_factory):
    """The workdir of an uninterrupted run of `table_of`."""
    folder = tmp_path_factory.mktemp("many")
    finish(folder / "run", base=micro, **table_of(folder / "subjects.csv"))
    return folder / "run"


@pytest.mark.slow
def test_a_table_of_subjects_trains_to_one_file_each(trained, micro, capsys):
    shapes = load_pipeline(micro).shapes
    found = {name: read_adapter(trained / f"{name}.safetensors", shapes)[0] for name in ("rex", "tom")}
    assert found["rex"].keys() == found["tom"].keys()
    ranks = {name: {x.shape[0] for n, x in factors.items() if "lora_B" in n} for name, factors in found.items()}
    assert ranks == {"rex": {1}, "tom": {2}}
    assert all((trained / "samples" / f"{name}.png").is_file() for name in found)

    evaluate.main(["--workdir", str(trained), "--judge", "embedded", "--count", "2"])
    said = capsys.readouterr().out
    assert "| pictures of | rex | tom |" in said and "subjects resemble their own photos most" in said
    assert (trained / "evaluation" / "bleed.png").is_file()


@pytest.mark.slow
def test_a_killed_run_writes_the_same_files(trained, micro, tmp_path):
    """A subject's file is there as soon as its steps are done; after SIGKILL the same command goes on to the same
    bytes."""
    workdir, table = tmp_path / "run", tmp_path / "subjects.csv"
    fields = table_of(table)
    process = start(workdir, base=micro, **fields)
    assert kill_when(process, lambda: checkpoints(workdir))
    first, other = workdir / "rex.safetensors", workdir / "tom.safetensors"
    assert checkpoints(workdir)[-1] < 120 and first.is_file() and not other.exists()
    first.unlink()
    said = finish(workdir, base=micro, **fields)
    assert "going on from step" in said and said.index("rex: 2 steps") < said.index("tom: 120 steps")
    for file in (first, other):
        assert file.read_bytes() == (trained / file.name).read_bytes()
    assert_same_state(read_state(workdir, 120), read_state(trained, 120))
    assert pictures(workdir / "samples") == pictures(trained / "samples")
    table_of(table, cat="teapot")
    assert "holds a run trained with other data" in finish(workdir, 1, base=micro, **fields)


def test_the_plan_has_notes_of_the_workdir_and_warnings_of_every_subject(micro, tmp_path):
    photos = ROOT / "examples" / "subjects" / "dog"
    (tmp_path / "photos.csv").write_text(f"name,photos,identifier\nrex,{photos},sks\ntom,{photos},dog\n")
    config = config_of(tmp_path / "run", base=micro, subjects=str(tmp_path / "photos.csv"), **FIELDS)
    job, subjects = make_job(config, load_pipeline(micro), make_mesh(1, 1, jax.devices()[:1])), read_subjects(config)
    examples = [examples_of(job, subject) for subject in subjects]
    lines = plan_text(job, subjects, examples, 0, ["step 4 is damaged"]).splitlines()
    assert "devices busy" not in "".join(lines)
    wide = make_job(config, load_pipeline(micro), make_mesh(8, 1))
    assert "2 subjects keep 1 of 8 devices busy" in plan_text(wide, subjects, examples, 0, [])
    begin = [number for number, line in enumerate(lines) if line.startswith(("  rex: ", "  tom: "))]
    own, other = lines[begin[0] : begin[1]], lines[begin[1] :]
    assert "  note: step 4 is damaged" in other
    assert not [line for line in own if "holds the identifier" in line]
    assert [
        line for line in other if line.startswith("    warning: class_prompt 'a photo of dog' holds the identifier")
    ]


def test_other_rows_are_another_run(tmp_path):
    """Another order or other values of a row are refused: states are told apart by their place alone. Those that train
    longest may train longer."""
    photos = ROOT / "examples" / "subjects" / "dog"
    rows = [f"rex,{photos},4,0.1,2", f"tom,{photos},8,0.1,2", f"pia,{photos},8,0.1,2"]

    def of(*rows):
        (tmp_path / "rows.csv").write_text("\n".join(["name,photos,steps,learning_rate,lora_rank", *rows]))
        subjects = read_subjects(config_of(tmp_path, subjects=str(tmp_path / "rows.csv"), **FIELDS))
        examples = read_examples(photos, 16, template="a {class_noun}", identifier="sks", class_noun="dog")
        return many.fingerprints(subjects, [examples] * len(rows))

    before = of(*rows)
    check_same("run", before, of(rows[0], *(row.replace(",8,", ",9,") for row in rows[1:])))
    for other in (
        (rows[1], rows[0], rows[2]),
        (rows[0].replace(",4,", ",5,"), *rows[1:]),
        (rows[0], rows[1].replace("0.1", "0.2"), rows[2]),
        (*rows[:2], rows[2].replace(",2", ",1")),
    ):
        with pytest.raises(ConfigError, match=r"subjects \(place, identifier, noun, steps, rate, rank\): changed: "):
            check_same("run", before, of(*other))


def test_one_folder_holds_the_class_images_of_one_noun(tmp_path):
    subjects = {"subjects": str(ROOT / "examples" / "subjects")}
    with pytest.raises(
        ConfigError, match=r"class_images = 'mine': one folder cannot hold .* write {class_noun} into its name"
    ):
        read_subjects(config_of(tmp_path, class_images="mine", **subjects))
    assert read_subjects(config_of(tmp_path, class_images="mine", prior_preservation=False, **subjects))
    assert read_subjects(config_of(tmp_path, class_images="mine/{class_noun}", **subjects))


def test_a_classes_file_gives_the_nouns(tmp_path):
    found = read_subjects(config_of(tmp_path, subjects=str(ROOT / "examples" / "subjects")))
    assert {subject.name: subject.class_noun for subject in found}["teapot"] == "teapot"
    assert len(found) == 6 and {subject.identifier for subject in found} == {"sks"}


def test_every_subject_has_the_wordings_of_the_templates(micro, tmp_path):
    photos = str(ROOT / "examples" / "subjects")
    config = config_of(tmp_path, base=micro, subjects=photos, templates="object", **FIELDS)
    job = make_job(config, load_pipeline(micro), make_mesh(1, 1, jax.devices()[:1]))
    for subject in read_subjects(config)[:2]:
        found = examples_of(job, subject)
        count = len(set(found.names))
        assert set(found.captions) == {text.format(f"sks {subject.class_noun}") for text in TEMPLATES["object"]}
        assert len(found.images) == len(found.captions) == count * len(TEMPLATES["object"])


def test_errors(tmp_path):
    with pytest.raises(ConfigError, match="many subjects share a frozen base"):
        check_config(config_of(tmp_path, subjects="photos"))
    for field, value in (("held_out_images", "1"), ("sr_crop", 8), ("prior_target", "base")):
        with pytest.raises(ConfigError, match=f"{field}.*: not implemented for many subjects at once"):
            check_config(config_of(tmp_path, subjects="photos", method="lora", **{field: value}))
    (tmp_path / "empty").mkdir()
    (tmp_path / "table.csv").write_text("name,steps\nrex,3\n")
    (tmp_path / "rate.csv").write_text("photos,learning_rate\nrex,fast\n")
    (tmp_path / "spelled.csv").write_text("photos,learningrate\nrex,0.1\n")
    (tmp_path / "latin.csv").write_bytes("photos\nédouard\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.csv is not UTF-8 text"):
        read_subjects(config_of(tmp_path, subjects=str(tmp_path / "latin.csv")))
    (tmp_path / "long.csv").write_bytes(b"photos,steps\rrex,3\rtom,3,4\r")
    with pytest.raises(ValueError, match=r"long\.csv, line 3: more cells than the columns photos, steps"):
        read_subjects(config_of(tmp_path, subjects=str(tmp_path / "long.csv")))
    (tmp_path / "negative.csv").write_text("photos,lora_rank\nrex,-1\n")
    (tmp_path / "ranks.csv").write_text("name,photos,lora_rank\na,rex,1\nb,rex,2\n")
    for subjects, message in (
        ("gone", "expected a folder of folders of images, or a .csv table"),
        ("empty", "expected subjects of different names, .*found none"),
        ("table.csv", "line 2: no photos"),
        ("rate.csv", "learning_rate = 'fast', expected a number"),
        ("spelled.csv", "unknown columns learningrate; expected some of name, photos"),
        (
            "negative.csv",
            "negative.csv, .*rex: the config cannot be used:\n  lora_rank = -1: expected a whole number above 0",
        ),
        ("ranks.csv", "lora_rank = 1, 2 in one program needs method = lora or dora"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_subjects(config_of(tmp_path, subjects=str(tmp_path / subjects)))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("../../x", r"name = '\.\./\.\./x': expected a file name"),
        ("b/c", "name = 'b/c': expected a file name of at most 200 bytes without folders"),
        ("é" * 101, "expected a file name of at most 200 bytes"),
        ("Rex\nrex", r"different names, .*found \['Rex', 'rex'\]"),
        ("e\u0301\n\u00e9", "different names"),
        ("rex,nan", "learning_rate = nan: expected a finite number"),
        ("rex,inf", "learning_rate = inf: expected a finite number"),
        ("rex,, ", "identifier = ' ': expected not empty"),
        ("rex,,,5", "lr_warmup_steps = 5 leaves nothing of steps = 5"),
    ],
)
def test_a_row_is_checked_like_a_config(tmp_path, row, message):
    rows = [f"dog,{line}" for line in row.split("\n")]
    (tmp_path / "rows.csv").write_text("\n".join(["photos,name,learning_rate,identifier,steps", *rows]))
    with pytest.raises(ConfigError, match=message):
        read_subjects(config_of(tmp_path, subjects=str(tmp_path / "rows.csv"), lr_warmup_steps=5, method="lora"))


def test_photos_of_a_table_lie_beside_it_at_home_or_on_a_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "rows.csv").write_text("photos,name\ndog,a\n~/cat,b\n/pictures,c\nhub:me/dog,d\ntfds:x:train,e\n")
    found = read_subjects(config_of(tmp_path, subjects=str(tmp_path / "rows.csv"), method="lora"))
    places = [f"{tmp_path}/dog", "/home/me/cat", "/pictures", "hub:me/dog", "tfds:x:train"]
    assert [subject.photos for subject in found] == places

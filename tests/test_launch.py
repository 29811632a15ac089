"""The launch files: their whole life against a `gcloud` that runs the hosts as processes here; and their form."""

import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from support.flags import xla_flags
from support.runs import SMALL, checkpoints, flags

from dreambooth_jax.export import main as export

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
FAKE_GCLOUD = ROOT / "tests" / "support" / "fake_gcloud.py"
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
FIELDS = SMALL | {"steps": 60, "save_every": 10, "sample_every": 60, "batch_size": 2}

# What a host has in place of the real python3: making an environment gives it this one, installing into it nothing.
HOST_PYTHON = """#!/usr/bin/env bash
case "$*" in
"-m uv venv"*)
    mkdir -p env/bin
    printf '#!/usr/bin/env bash\nexec {python} "$@"\n' >env/bin/python && chmod +x env/bin/python ;;
"-m pip install"* | "-m uv pip install"*) ;;
*) echo "unexpected: $*" >&2; exit 1 ;;
esac
"""


@pytest.fixture
def cloud(micro, tmp_path):
    """The environment of a launch script: a fake cloud, and variables for a small run."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for name, text in (
        (
            "gcloud",
            f'#!/usr/bin/env bash\nexec {sys.executable} {FAKE_GCLOUD} "$@"\n',
        ),
        ("python3", HOST_PYTHON.format(python=sys.executable)),
    ):
        (bin_folder / name).write_text(text)
        (bin_folder / name).chmod(0o755)
    (tmp_path / "cloud").mkdir()
    return os.environ | {
        "PATH": f"{bin_folder}:{os.environ['PATH']}",
        "FAKE_CLOUD": str(tmp_path / "cloud"),
        "POLL": "0.2",
        "WORKDIR": str(tmp_path / "bucket"),
        "RESULTS": str(tmp_path / "results"),
        "NAME": "job",
        "CONFIG": "configs/dog.py",
        "ARGS": " ".join(f'"{flag}"' for flag in flags(base=micro, **FIELDS)),
        "XLA_FLAGS": xla_flags(2),
    }


def calls(cloud) -> list[str]:
    return (Path(cloud["FAKE_CLOUD"]) / "calls").read_text().splitlines()


def assert_slice_is_gone(cloud) -> None:
    assert not (Path(cloud["FAKE_CLOUD"]) / "state").exists()


def test_a_preempted_slice_is_asked_for_again_and_the_run_resumes(cloud, tmp_path):
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([ROOT / "launch" / "queued.sh", "all"], env=cloud, stdout=log, stderr=log)
    while not checkpoints(tmp_path / "bucket"):
        assert process.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.05)
    (tmp_path / "cloud" / "preempt").touch()
    assert process.wait(600) == 0, (tmp_path / "log").read_text()[-5000:]
    text = (tmp_path / "log").read_text()
    assert "the slice was taken away" in text and "going on from step" in text
    kinds = [
        next((kind for kind in ("create", "delete", "scp", "rsync") if f" {kind} " in call), "")
        for call in calls(cloud)
    ]
    assert [kind for kind in kinds if kind] == ["create", "scp", "delete", "create", "scp", "rsync", "delete"]
    assert_slice_is_gone(cloud)

    results = tmp_path / "results"
    assert [int(row.split(",")[0]) for row in (results / "metrics.csv").read_text().splitlines()[1:]] == list(
        range(1, 61)
    )
    assert list((results / "samples").glob("*.png"))
    assert not list(results.glob("checkpoints/*/optimizer/*"))
    export(["--workdir", str(results), "--output", str(tmp_path / "model")])
    assert (tmp_path / "model" / "unet" / "config.json").exists()


def test_a_training_that_fails_by_itself_ends_and_deletes_the_slice(cloud):
    cloud["ARGS"] += " --config.learning_rate=-1.0"
    done = subprocess.run([ROOT / "launch" / "queued.sh", "all"], env=cloud, capture_output=True, text=True)
    assert done.returncode == 1
    assert "learning_rate = -1.0: expected above 0" in done.stderr and "although the slice is well" in done.stderr
    assert sum(" create " in call for call in calls(cloud)) == 1
    assert_slice_is_gone(cloud)


def test_a_slice_on_demand(cloud, tmp_path):
    cloud["ARGS"] += " --config.steps=4"
    done = subprocess.run([ROOT / "launch" / "tpu_vm.sh", "all"], env=cloud, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert checkpoints(tmp_path / "results") == [4]
    assert_slice_is_gone(cloud)


@pytest.mark.parametrize("script", ["tpu_vm.sh", "queued.sh"])
def test_a_dry_run_prints_what_a_run_does_and_does_nothing(cloud, script, tmp_path):
    done = subprocess.run(
        [ROOT / "launch" / script, "all"], env=cloud | {"DRY_RUN": "1"}, capture_output=True, text=True, check=True
    )
    assert not (tmp_path / "cloud" / "calls").exists() and not (tmp_path / "results").exists()
    steps = [line for line in done.stderr.splitlines() if line.startswith("+ ")]
    for command in (" create job ", " scp ", "dreambooth_jax.train", " rsync ", " delete job "):
        assert sum(command in step for step in steps) == 1


@pytest.mark.parametrize("script", ["tpu_vm.sh", "queued.sh"])
def test_a_slice_that_exists_is_used_and_stays(cloud, script, tmp_path):
    subprocess.run([ROOT / "launch" / script, "create"], env=cloud, check=True, capture_output=True)
    cloud["ARGS"] += " --config.learning_rate=-1.0"
    done = subprocess.run([ROOT / "launch" / script, "all"], env=cloud, capture_output=True, text=True)
    assert done.returncode and "a slice named job exists" in done.stderr
    assert sum(" create " in call for call in calls(cloud)) == 1
    assert not [call for call in calls(cloud) if " delete " in call]
    assert (tmp_path / "cloud" / "state").exists()


def test_photos_of_an_earlier_run_do_not_stay_on_the_hosts(cloud, tmp_path):
    for step, subject in (("create", ""), ("install", "dog"), ("install", "cat")):
        photos = {"PHOTOS": str(ROOT / "examples" / "subjects" / subject)} if subject else {}
        subprocess.run([ROOT / "launch" / "tpu_vm.sh", step], env=cloud | photos, check=True, capture_output=True)
    for host in (tmp_path / "cloud").glob("host*"):
        found = {path.name: path.read_bytes() for path in (host / "job" / "photos").iterdir()}
        assert found == {path.name: path.read_bytes() for path in (ROOT / "examples" / "subjects" / "cat").iterdir()}
        assert (host / "job" / "env" / "bin" / "python").exists()


@pytest.mark.parametrize("script", ["tpu_vm.sh", "queued.sh"])
def test_a_creation_that_fails_deletes_nothing(cloud, script, tmp_path):
    (tmp_path / "cloud" / "full").touch()
    done = subprocess.run([ROOT / "launch" / script, "all"], env=cloud, capture_output=True, text=True)
    assert done.returncode == 1 and "the slice was not created" in done.stderr
    assert not [call for call in calls(cloud) if " delete " in call or " scp " in call]


def test_a_second_creation_that_fails_deletes_nothing_either(cloud, tmp_path):
    (tmp_path / "cloud" / "once").touch()
    done = subprocess.run([ROOT / "launch" / "queued.sh", "all"], env=cloud, capture_output=True, text=True)
    assert done.returncode == 1 and "the slice was not created" in done.stderr
    made = [kind for call in calls(cloud) for kind in ("create", "delete") if f" {kind} " in call]
    assert made == ["create", "delete", "create"]


@pytest.mark.parametrize("args", ["--config.steps='2", "'a\nb'"])
def test_arguments_that_cannot_be_split_are_an_error(cloud, args):
    done = subprocess.run(
        [ROOT / "launch" / "tpu_vm.sh", "train"],
        env=cloud | {"ARGS": args, "DRY_RUN": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "expected words" in done.stderr and "dreambooth_jax.train" not in done.stderr


ODD = "a; touch pwned #'\"$(touch pwned)\nz"


def step(cloud, name: str) -> str:
    """What a step of tpu_vm.sh prints as its commands."""
    script = ROOT / "launch" / "tpu_vm.sh"
    return subprocess.run([script, name], env=cloud, capture_output=True, text=True, check=True).stderr


def test_odd_values_reach_the_hosts_as_they_are(cloud, tmp_path):
    printed = step(cloud | {"WORKDIR": ODD, "CONFIG": "a b.py", "DRY_RUN": "1"}, "train")
    (on_host,) = [word for word in shlex.split(printed) if word.startswith("--command=")]
    command = on_host.removeprefix("--command=cd job &&")
    run = subprocess.run(["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, text=True, cwd=tmp_path)
    words = run.stdout.split("\0")
    assert f"--config.workdir={ODD}" in words and "a b.py" in words and "--config.instance_images=photos" in words
    assert not list(tmp_path.rglob("pwned"))


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("evaluate", ["dreambooth_jax.evaluate", "--workdir", "b/run"]),
        (
            "protocol",
            [
                "dreambooth_jax.evaluate",
                "--config",
                "configs/protocol.py:sd15",
                "--config.workdir=b/run",
                "--config.dataset=photos",
                "--config.train.batch_size=8",
                "--config.train.mesh_fsdp=8",
            ],
        ),
    ],
)
def test_a_slice_scores_a_run_or_a_data_set(cloud, module, expected):
    del cloud["CONFIG"], cloud["ARGS"]
    printed = step(cloud | {"MODULE": module, "WORKDIR": "b/run", "DRY_RUN": "1"}, "train")
    (on_host,) = [word for word in shlex.split(printed) if word.startswith("--command=")]
    words = shlex.split(on_host)
    assert words[words.index("-m") + 1 :] == expected
    wrong = subprocess.run(
        [ROOT / "launch" / "tpu_vm.sh", "train"], env=cloud | {"MODULE": "scores"}, capture_output=True, text=True
    )
    assert wrong.returncode == 2 and "expected train, evaluate or protocol" in wrong.stderr


def test_a_slice_trains_and_scores_a_data_set(cloud, micro, tmp_path):
    """The whole protocol of one subject on two hosts: the table comes back."""
    shutil.copytree(ROOT / "examples" / "subjects" / "dog", tmp_path / "set" / "dog")
    (tmp_path / "set" / "prompts_and_classes.txt").write_text("subject_name,class\ndog,dog\n")
    train = SMALL | {"steps": 2, "num_class_images": 2, "base": micro, "train_text_encoder": False, "batch_size": 2}
    named = {f"train.{name}": value for name, value in train.items() if not name.startswith("sample_")}
    named |= {"judge": "embedded", "count": 2, "class_count": 2, "prompts": "world"}
    cloud |= {"MODULE": "protocol", "CONFIG": "configs/protocol.py", "PHOTOS": str(tmp_path / "set")}
    cloud["ARGS"] = " ".join(f'"{flag}"' for flag in flags(**named))
    done = subprocess.run([ROOT / "launch" / "tpu_vm.sh", "all"], env=cloud, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "| dog |" in (tmp_path / "results" / "table.md").read_text()
    assert_slice_is_gone(cloud)


def test_a_folder_of_photos_may_have_any_name(cloud, tmp_path):
    photos = tmp_path / "d, e"
    shutil.copytree(ROOT / "examples" / "subjects" / "dog", photos)
    step(cloud, "create")
    copies = tmp_path / "copies"
    copies.mkdir()
    step(cloud | {"PHOTOS": str(photos), "TMPDIR": str(copies)}, "install")
    host = tmp_path / "cloud" / "host0"
    assert {path.name for path in (host / "job" / "photos").iterdir()} == {path.name for path in photos.iterdir()}
    assert not (host / "job.tgz").exists() and not list(copies.iterdir())


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(script):
    done = subprocess.run(["shellcheck", "-x", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", [path for path in SCRIPTS if path.name != "common.sh"], ids=lambda path: path.name)
def test_without_a_word_it_says_which_there_are(script):
    done = subprocess.run([script], capture_output=True, text=True)
    assert done.returncode == 2 and "delete" in done.stderr


def render(**variables) -> subprocess.CompletedProcess:
    environment = os.environ | {"DRY_RUN": "1"} | variables
    return subprocess.run([ROOT / "launch" / "gke.sh", "submit"], capture_output=True, text=True, env=environment)


def test_the_jobset_holds_odd_values_as_they_are():
    job = yaml.safe_load(render(PHOTOS=ODD, WORKDIR="a: b #c", QUEUE="${NAME}").stdout)
    (container,) = job["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
    assert f"--config.instance_images={ODD}" in container["args"] and "--config.workdir=a: b #c" in container["args"]
    assert job["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "${NAME}"}
    wrong = render(HOSTS="2; true")
    assert wrong.returncode and "HOSTS" in wrong.stderr and "expected a whole number" in wrong.stderr


def test_the_container_does_not_run_as_root():
    assert "\nUSER trainer\n" in (ROOT / "launch" / "Dockerfile").read_text()
    pod = yaml.safe_load(render().stdout)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"]


def test_the_jobset_has_the_shape_that_kubernetes_takes():
    done = render(NAME="rex", HOSTS="4", QUEUE="spot")
    assert "$" not in done.stdout
    job = yaml.safe_load(done.stdout)
    assert (job["apiVersion"], job["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert job["metadata"]["name"] == "rex"
    assert job["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "spot"}
    spec = job["spec"]
    assert spec.keys() == {"failurePolicy", "replicatedJobs"} and type(spec["failurePolicy"]["maxRestarts"]) is int
    (replicated,) = spec["replicatedJobs"]
    assert replicated.keys() == {"name", "replicas", "template"}
    work = replicated["template"]["spec"]
    assert work["parallelism"] == work["completions"] == 4 and work["backoffLimit"] == 0
    pod = work["template"]["spec"]
    assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] > 30
    assert pod["nodeSelector"].keys() == {"cloud.google.com/gke-tpu-accelerator", "cloud.google.com/gke-tpu-topology"}
    (container,) = pod["containers"]
    assert container["resources"]["requests"] == container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["command"] == ["python", "-m", "dreambooth_jax.train"]
    assert all(argument.startswith("--config") for argument in container["args"])


def test_a_jobset_runs_the_protocol():
    job = yaml.safe_load(render(MODULE="protocol", PHOTOS="gs://b/set").stdout)
    (container,) = job["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["python", "-m", "dreambooth_jax.evaluate"]
    assert {"--config=configs/protocol.py:sd15", "--config.dataset=gs://b/set", "--config.train.batch_size=8"} <= set(
        container["args"]
    )

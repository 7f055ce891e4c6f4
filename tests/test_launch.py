"""The launchers, with real processes: `python` is a stand-in, gcloud and its like are fakes."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "launch"
ARGUMENTS = [
    "--config=configs/own.py",
    "a b",
    "",
    'it\'s "$HOME" \\n $(x) ${NAME} & *',
    "two\nlines",
]
VARIABLES = {
    "local.sh": {"PROCESSES": "3", "DEVICES": "4"},
    "tpu_pod.sh": {
        "NAME": "pod",
        "PROJECT": "project",
        "ZONE": "us-west4-a",
        "TPU_TYPE": "v5litepod-16",
        "TPU_RUNTIME": "v2-alpha-tpuv5-lite",
        "POLL_SECONDS": "0",
    },
    "gke.sh": {
        "NAME": "slice",
        "IMAGE": "registry/image:1",
        "TPU_ACCELERATOR": "tpu-v5-lite-podslice",
        "TPU_TOPOLOGY": "4x4",
        "CHIPS": "4",
    },
    "slurm.sh": {"NODES": "2", "GPUS": "4"},
}
REQUIRED = [(script, name) for script in ("tpu_pod.sh", "gke.sh") for name in VARIABLES[script]]
REQUIRED = [each for each in REQUIRED if each[1] != "POLL_SECONDS"]
REQUIRED += [("slurm.sh", "NODES"), ("slurm.sh", "GPUS")]

# Appends what it was called with to $RECORD, then does what the test says.
RECORDER = """
import json, os, signal, sys, time
name, arguments = sys.argv[1], sys.argv[2:]
def record(**more):
    call = {"name": name, "argv": arguments, "pid": os.getpid(), **more}
    with open(os.environ["RECORD"], "a") as file:
        file.write(json.dumps(call) + "\\n")
def put(queue, *values):
    path = os.path.join(os.environ["QUEUES"], queue)
    with open(f"{path}.{os.getpid()}", "w") as file:
        file.write("\\n".join(values))
    os.replace(file.name, path)
def take(queue):  # the next of what was put there; the last stays
    with open(os.path.join(os.environ["QUEUES"], queue)) as file:
        first, *rest = file.read().split("\\n")
    if rest:
        put(queue, *rest)
    return first
"""

PYTHON = """
record(env={key: os.environ.get(key) for key in (
    "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "JAX_PLATFORMS", "XLA_FLAGS",
    "JAX_LOCAL_DEVICE_IDS")})
process = os.environ.get("JAX_PROCESS_ID")
signals = []
def saves(seconds=0.0, deaf=False):  # as main does when it is asked to stop
    def handle(number, frame):
        signals.append(number)
        if len(signals) > 1:
            os._exit(128 + number)
        print("saving", flush=True)
    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGINT, handle)
    record(ready=True)
    while deaf or not signals:
        time.sleep(0.02)
    time.sleep(seconds)
    print("saved", flush=True)
    sys.exit(75)
print("from", process, flush=True)
exec(os.environ.get("BEHAVIOUR", ""))
"""

# A pod of one worker, in the folder $WORKER.
GCLOUD = """
record()
if "list" in arguments:
    print(take("states"))
elif "delete" in arguments and take("anew"):
    put("states", "", "ACTIVE")
    put("nodes", "READY")
elif "describe" in arguments:
    print(take("nodes"))
elif "scp" in arguments:
    import shutil
    shutil.copy(arguments[4], os.path.join(os.environ["WORKER"], "corrector_jax.tar.gz"))
elif "ssh" in arguments:
    import subprocess
    command = next(a for a in arguments if a.startswith("--command="))
    code = subprocess.run(["bash", "-c", command[10:]], cwd=os.environ["WORKER"]).returncode
    if code and take("anew"):
        put("states", "SUSPENDED")
    sys.exit(code)
"""

# Of the working tree, with a worker's environment that costs nothing.
GIT = """
record()
for path in [a.removeprefix("--output=") for a in arguments if a.startswith("--output=")]:
    import io, tarfile
    with tarfile.open(path, "w:gz") as tar:
        tar.add(os.environ["LAUNCH_FOLDER"], "corrector_jax/launch")
        script = b"mkdir -p corrector_jax/.venv/bin; touch corrector_jax/.venv/bin/activate"
        entry = tarfile.TarInfo("corrector_jax/launch/tpu_install.sh")
        entry.mode, entry.size = 0o755, len(script)
        tar.addfile(entry, io.BytesIO(script))
"""

# Runs a copy of the script as the first node does, again for each time that it asks for that.
SBATCH = """
import shutil, subprocess
record()
place = next(i for i, a in enumerate(arguments) if not a.startswith("--"))
copy = os.path.join(os.environ["QUEUES"], "slurm_script")
shutil.copy(arguments[place], copy)
for restart in range(20):
    if not os.path.exists(copy):
        break
    environment = os.environ | {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restart)}
    os.rename(copy, copy + ".running")
    command = ["bash", copy + ".running", *arguments[place + 1:]]
    code = subprocess.run(command, env=environment).returncode
sys.exit(code)
"""
SCONTROL = """
import shutil
record()
copy = os.path.join(os.environ["QUEUES"], "slurm_script")
shutil.copy(copy + ".running", copy)
"""
SRUN = """
record()
while arguments[0].startswith("--"):
    arguments.pop(0)
os.execvp(arguments[0], arguments)
"""
KUBECTL = "record(stdin=sys.stdin.read())"


# What runs in the background is given SIGINT ignored, which bash cannot undo: here it counts.
WITH_SIGINT = (
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    "os.execv(sys.argv[1], sys.argv[1:])"
)


class Machine:
    """Runs launchers among fakes, and says what those were called with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("bin", "queues", "worker", "tmp"):
            (folder / name).mkdir()
        for queue in ("states", "codes", "anew"):
            self.put(queue)
        self.put("nodes", "READY")
        fakes = {"python": PYTHON, "gcloud": GCLOUD, "git": GIT, "sbatch": SBATCH, "srun": SRUN}
        fakes |= {"scontrol": SCONTROL, "kubectl": KUBECTL}
        for name, code in fakes.items():
            (folder / f"{name}.py").write_text(RECORDER + code)
            script = folder / "bin" / name
            start = f'exec {shlex.quote(sys.executable)} -S {folder}/{name}.py {name} "$@"'
            script.write_text(f"#!/bin/sh\n{start}\n")
            script.chmod(0o755)
        self.environment = {
            "HOME": str(folder),
            "LAUNCH_FOLDER": str(LAUNCH),
            "PATH": f"{folder}/bin:/usr/bin:/bin",
            "QUEUES": f"{folder}/queues",
            "RECORD": f"{folder}/record",
            "TMPDIR": f"{folder}/tmp",
            "WORKER": f"{folder}/worker",
        }

    def put(self, queue: str, *values: object) -> None:
        (self.folder / "queues" / queue).write_text("\n".join(map(str, values)))

    def start(self, script: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", WITH_SIGINT, str(LAUNCH / script), *arguments],
            env=self.environment | VARIABLES[script] | environment,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, script: str, *arguments: str, **environment: str) -> tuple[int, str, str]:
        process = self.start(script, *arguments, **environment)
        try:
            said, complained = process.communicate(timeout=60)
        finally:
            process.kill()
        return process.returncode, said, complained

    def calls(self, *names: str) -> list[dict]:
        path = self.folder / "record"
        lines = path.read_text().splitlines() if path.exists() else []
        return [call for call in map(json.loads, lines) if not names or call["name"] in names]

    def wait_for(self, count: int, **what: object) -> None:
        end = time.monotonic() + 30
        while sum(what.items() <= call.items() for call in self.calls()) < count:
            assert time.monotonic() < end, f"it did not happen in time: {self.calls()}"
            time.sleep(0.02)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def verbs(machine: Machine) -> list[str]:
    """What gcloud was asked for, but for states."""
    asked = [call["argv"] for call in machine.calls("gcloud")]
    names = ("create", "delete", "scp", "ssh")
    found = [next((name for name in names if name in argv), "") for argv in asked]
    return [name for name in found if name]


def main_calls(machine: Machine) -> list[list[str]]:
    return [call["argv"] for call in machine.calls("python") if "env" in call]


# ---- all of them


def test_shellcheck_finds_nothing():
    tool = Path(sys.executable).parent / "shellcheck"
    scripts = [*LAUNCH.glob("*.sh"), ROOT / ".ci" / "run"]
    done = subprocess.run([tool, "-x", *scripts], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout


def test_the_readme_has_every_variable_of_every_launcher_with_its_default():
    rows = re.findall(
        r"^\| `(\w+)` \| ([\w, ]+) \| (.+?) \|", (LAUNCH / "README.md").read_text(), re.M
    )
    told = {
        (f"{who}.sh", name, default.strip("`"))
        for name, users, default in rows
        for who in users.split(", ")
    }
    found = set()
    for script in VARIABLES:
        text = (LAUNCH / script).read_text()
        found |= {(script, name, "required") for name in re.findall(r"^need (\w+)", text, re.M)}
        for name, default in re.findall(r"^(\w+)=\$\{\1:-(.+)\}$", text, re.M):
            found.add((script, name, default))
    options = {
        ("tpu_pod.sh", "TPU_OPTIONS", "--spot"),
        ("tpu_pod.sh", "TPU_KEEP", "no"),
    }
    assert found | options == told


@pytest.mark.parametrize("script", VARIABLES)
def test_a_dry_run_runs_nothing_and_prints_what_can_be_pasted(machine, script):
    code, printed, complained = machine.run(script, "--dry-run", *ARGUMENTS)
    assert (code, complained) == (0, "")
    assert machine.calls() == []
    assert "corrector_jax.main" in printed or script == "tpu_pod.sh"

    pasted = printed.partition("# in the job:")[0]  # slurm.sh: it is not the user who runs those
    environment = machine.environment | VARIABLES[script]
    # As slurm.sh exports them to the job.
    environment |= {"LAUNCH": str(LAUNCH), "CPUS": "32", "MAX_RESTARTS": "10"}
    done = subprocess.run(["bash", "-ec", pasted], env=environment, cwd=machine.folder, timeout=30)
    assert done.returncode == 0
    by_hand = machine.calls()
    (machine.folder / "record").unlink()

    machine.put("states", "", "ACTIVE")
    assert machine.run(script, *ARGUMENTS)[0] == 0
    asked = ("list", "describe", "diff")
    keys = ("name", "argv", "stdin")
    by_launcher = [c for c in machine.calls() if not set(asked) & set(c["argv"])]
    key = lambda call: json.dumps([call.get(key) for key in keys])  # noqa: E731
    assert sorted(map(key, by_hand)) == sorted(map(key, by_launcher))


@pytest.mark.parametrize("script", VARIABLES)
def test_arguments_arrive_unchanged(machine, script):
    machine.put("states", "", "ACTIVE")
    assert machine.run(script, *ARGUMENTS)[0] == 0
    if script == "gke.sh":
        (container,) = pod(machine)["containers"]
        expanded = [argument.replace("$$", "$") for argument in container["args"]]  # by Kubernetes
        assert [*container["command"], *expanded] == [
            "python",
            "-m",
            "corrector_jax.main",
            *ARGUMENTS,
        ]
        assert not re.search(r"(?<!\$)\$(\$\$)*\(", container["args"][3])
    else:
        processes = 3 if script == "local.sh" else 1
        assert main_calls(machine) == [["-m", "corrector_jax.main", *ARGUMENTS]] * processes


@pytest.mark.parametrize(("script", "name"), REQUIRED)
def test_a_missing_variable_is_one_sentence_that_names_it(machine, script, name):
    code, said, complained = machine.run(script, "--config=x", **{name: ""})
    assert (code, said) == (2, "")
    assert complained.count("\n") == 1
    assert complained.startswith(f"error: {name} is not set: it is ")
    assert machine.calls() == []


@pytest.mark.parametrize(
    ("script", "name", "value"),
    [
        ("local.sh", "PROCESSES", "two"),
        ("local.sh", "PROCESSES", "0"),
        ("slurm.sh", "GPUS", "-1"),
        ("tpu_pod.sh", "POLL_SECONDS", "1m"),
        ("gke.sh", "TPU_TOPOLOGY", "16"),
        ("gke.sh", "CHIPS", "3"),
    ],
)
def test_a_variable_that_cannot_be_is_one_sentence_that_names_it(machine, script, name, value):
    code, said, complained = machine.run(script, "--config=x", **{name: value})
    assert (code, said, complained.count("\n")) == (2, "", 1)
    assert complained.startswith("error: ")
    assert name in complained
    assert machine.calls() == []


# ---- local


def test_local_processes_are_told_of_each_other_and_their_lines_carry_their_numbers(machine):
    code, said, complained = machine.run("local.sh", "--config=x", XLA_FLAGS="--a=1")
    assert (code, complained) == (0, "")
    assert sorted(said.splitlines()) == ["[0] from 0", "[1] from 1", "[2] from 2"]
    environments = [call["env"] for call in machine.calls("python")]
    assert sorted(env["JAX_PROCESS_ID"] for env in environments) == ["0", "1", "2"]
    (address,) = {env["JAX_COORDINATOR_ADDRESS"] for env in environments}
    assert re.fullmatch(r"127\.0\.0\.1:2\d{4}", address)
    for env in environments:
        assert env["JAX_NUM_PROCESSES"] == "3"
        assert env["JAX_PLATFORMS"] == "cpu"
        assert env["XLA_FLAGS"] == "--a=1 --xla_force_host_platform_device_count=4"


@pytest.mark.parametrize("ask", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_every_process_once_and_all_may_save(machine, ask):
    # Ctrl-C goes to all of a terminal's processes; process 1 saves for longer than process 0.
    behaviour = "saves(0.6 if process == '1' else 0)"
    process = machine.start("local.sh", "--config=x", BEHAVIOUR=behaviour)
    machine.wait_for(3, ready=True)
    if ask == signal.SIGINT:
        os.killpg(process.pid, ask)
    else:
        process.send_signal(ask)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 75
    expected = [f"[{i}] {word}" for i in range(3) for word in (f"from {i}", "saved", "saving")]
    assert sorted(said.splitlines()) == sorted(expected)


def test_a_process_that_fails_ends_the_others_and_its_code_is_returned(machine):
    behaviour = """
if process == "1":
    while sum("ready" in line for line in open(os.environ["RECORD"])) < 2:
        time.sleep(0.02)
    sys.exit("what went wrong")
saves(deaf=process == "2")
"""
    began = time.monotonic()
    code, said, complained = machine.run(
        "local.sh", "--config=x", BEHAVIOUR=behaviour, GRACE_SECONDS="1"
    )
    assert code == 1
    assert "[1] what went wrong" in said
    assert "[0] saved" in said
    assert "[2] saved" not in said  # it hung, and was killed
    assert complained.splitlines()[0] == "local.sh: process 1 ended with exit code 1"
    assert time.monotonic() - began < 30
    for call in machine.calls("python"):
        with pytest.raises(ProcessLookupError):
            os.kill(call["pid"], 0)


def test_of_several_codes_the_one_that_must_be_mended_counts_most(machine):
    behaviour = "time.sleep(0.3 * (process == '1')); sys.exit([75, {}, 0][int(process)])"
    for other, expected in ((2, 2), (0, 75)):
        code = machine.run("local.sh", "--config=x", BEHAVIOUR=behaviour.format(other))[0]
        assert code == expected


def test_two_real_processes_of_main(machine):
    code, said, complained = machine.run(
        "local.sh",
        "--help",
        PATH=f"{Path(sys.executable).parent}:/usr/bin:/bin",
        PYTHONPATH=str(ROOT),
        PROCESSES="2",
    )
    assert (code, complained) == (0, "")
    for number in (0, 1):
        assert f"[{number}] Configuration keys and their defaults:" in said


# ---- a TPU pod


def test_a_pod_is_asked_for_once_used_and_given_back(machine):
    machine.put("states", "", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
    code, _, complained = machine.run("tpu_pod.sh", "--config=x")
    assert code == 0
    assert verbs(machine) == ["create", "scp", "ssh", "ssh", "delete"]
    assert "pod is PROVISIONING" in complained
    create = next(call["argv"] for call in machine.calls("gcloud") if "create" in call["argv"])
    assert {"--spot", "--node-id=pod", "--accelerator-type=v5litepod-16"} <= set(create)


@pytest.mark.parametrize(
    "taken",
    [
        "put('states', 'SUSPENDING', 'SUSPENDED'); time.sleep(60)",
        "put('nodes', 'PREEMPTED'); time.sleep(60)",  # its queued resource still says ACTIVE
        "sys.exit(76)",  # seen only after main has ended
    ],
)
def test_a_pod_that_is_taken_away_is_asked_for_again_and_the_same_command_goes_on(machine, taken):
    machine.put("states", "", "ACTIVE")
    machine.put("anew", "yes")
    machine.put("codes", "first", "")
    # The first command may hang, as ssh does where a machine vanishes.
    behaviour = f"if take('codes'): {taken}"
    code, _, complained = machine.run("tpu_pod.sh", *ARGUMENTS, BEHAVIOUR=behaviour)
    assert code == 0, complained
    assert verbs(machine) == ["create", "scp", "ssh", "ssh", "delete"] * 2
    assert main_calls(machine) == [["-m", "corrector_jax.main", *ARGUMENTS]] * 2
    assert "failed" not in complained


@pytest.mark.parametrize(
    ("codes", "expected"), [([2], 2), ([75, 75, 76, 0], 0), ([76, 134, 0], 134)]
)
def test_on_a_pod_75_always_goes_on_2_never_and_failures_a_few_times(machine, codes, expected):
    machine.put("codes", *codes)
    machine.put("states", "", "ACTIVE")
    code, _, _ = machine.run(
        "tpu_pod.sh", "--config=x", BEHAVIOUR="sys.exit(int(take('codes')))", MAX_RESTARTS="1"
    )
    assert code == expected
    assert len(main_calls(machine)) == codes.index(expected) + 1
    assert verbs(machine).count("create") == verbs(machine).count("delete") == 1


def test_a_pod_can_be_kept_and_is_used_again(machine):
    machine.put("states", "ACTIVE")
    code, _, complained = machine.run("tpu_pod.sh", "--config=x", TPU_KEEP="1")
    assert (code, verbs(machine)) == (0, ["scp", "ssh", "ssh"])
    assert "queued-resources delete pod" in complained


def test_a_request_that_fails_is_not_repeated_for_ever(machine):
    machine.put("states", *["", "FAILED"] * 5)
    code, _, _ = machine.run("tpu_pod.sh", "--config=x", MAX_RESTARTS="1")
    assert (code, verbs(machine)) == (1, ["create", "delete"] * 2)


def test_a_first_request_that_is_refused_is_not_repeated(machine):
    (machine.folder / "gcloud.py").write_text(
        RECORDER + "record()\nif 'create' in arguments: sys.exit('no quota')"
    )
    code, _, complained = machine.run("tpu_pod.sh", "--config=x")
    assert (code, verbs(machine)) == (1, ["create"])
    assert "no quota" in complained


def test_what_an_earlier_connection_left_running_saves_before_main_starts_again(machine):
    machine.put("states", "ACTIVE")
    first = machine.start("tpu_pod.sh", "--config=x", BEHAVIOUR="saves()")
    machine.wait_for(1, ready=True)
    first.kill()  # the launcher is gone; what it started is not
    first.wait()
    (left,) = [call["pid"] for call in machine.calls() if call.get("ready")]
    os.kill(left, 0)
    code, _, _ = machine.run("tpu_pod.sh", "--config=x", GRACE_SECONDS="5")
    assert code == 0
    with pytest.raises(ProcessLookupError):
        os.kill(left, 0)
    assert "saved" in first.communicate(timeout=10)[0]


def test_ctrl_c_leaves_the_pod_and_says_how_to_end_it(machine):
    machine.put("states", "ACTIVE")
    process = machine.start("tpu_pod.sh", "--config=x", BEHAVIOUR="saves()")
    machine.wait_for(1, ready=True)
    os.killpg(process.pid, signal.SIGINT)
    _, complained = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "queued-resources delete pod" in complained
    assert "delete" not in verbs(machine)


# ---- GKE


def pod(machine: Machine) -> dict:
    (call,) = machine.calls("kubectl")
    assert call["argv"] == ["create", "--filename=-"]
    jobset = yaml.safe_load(call["stdin"])
    assert "${" not in json.dumps(jobset).replace("$${", "")
    return jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


def test_the_jobset_has_a_pod_for_each_host_and_stops_at_2(machine):
    assert machine.run("gke.sh", "--config=x", TPU_TOPOLOGY="2x2x4", MAX_RESTARTS="9")[0] == 0
    jobset = yaml.safe_load(machine.calls("kubectl")[0]["stdin"])
    assert jobset["metadata"]["name"] == "slice"
    policy = jobset["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 9
    assert [rule["action"] for rule in policy["rules"]] == ["FailJobSet"]
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["completions"] == job["parallelism"] == 4
    assert job["backoffLimit"] == 0
    (rule,) = job["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["values"]) == ("FailJob", [2])
    spec = pod(machine)
    (container,) = spec["containers"]
    assert container["name"] == rule["onExitCodes"]["containerName"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert spec["restartPolicy"] == "Never"  # else Kubernetes refuses the policy
    assert set(spec["nodeSelector"].values()) == {"tpu-v5-lite-podslice", "2x2x4"}


# ---- SLURM


def test_slurm_runs_one_task_a_node_with_all_its_gpus(machine):
    assert machine.run("slurm.sh", "--config=x")[0] == 0
    (submitted,) = (call["argv"] for call in machine.calls("sbatch"))
    expected = {"--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=4", "--requeue"}
    assert expected | {"--signal=TERM@120", "--cpus-per-task=32"} <= set(submitted)
    (call,) = machine.calls("python")
    assert call["env"]["JAX_LOCAL_DEVICE_IDS"] == "0,1,2,3"


@pytest.mark.parametrize(
    ("codes", "expected", "runs"),
    [([2], 2, 1), ([76, 75, 75, 0], 0, 4), ([75, 75, 76], 76, 3)],
)
def test_slurm_queues_again_after_75_and_a_few_failures_and_not_after_2(
    machine, codes, expected, runs
):
    machine.put("codes", *codes)
    code, _, _ = machine.run(
        "slurm.sh", "--config=x", BEHAVIOUR="sys.exit(int(take('codes')))", MAX_RESTARTS="2"
    )
    assert code == expected
    assert main_calls(machine) == [["-m", "corrector_jax.main", "--config=x"]] * runs
    assert [call["argv"] for call in machine.calls("scontrol")] == [["requeue", "7"]] * (runs - 1)

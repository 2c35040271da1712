"""What the launchers would run, and how local.sh treats its processes."""

import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib

import jax
import pytest
import yaml

from tensorar_jax.parallel import processes

ROOT = pathlib.Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
SCRIPTS = sorted((ROOT / "launch").rglob("*.sh"))
RUN = ["configs/digits.py", "--mode=train", "--workdir=a b"]
TRICKY = '--config.x={"a": "$(HOME)\\"}'
CLUSTER = re.compile("SLURM|OMPI|TPU|JAX|CUDA|XLA|NCCL|PYTHON$")

# Stands for the interpreter: says what it was given and waits for SIGTERM.
PROGRAM = """#!/usr/bin/env bash
trap 'echo stopped; exit 75' TERM
echo "started $*"
case "$*" in
  *--process_id=1*) [ -z "$CODE" ] || { sleep 0.5; exit "$CODE"; } ;;
  *) [ -z "$DEAF" ] || trap '' TERM ;;
esac
while :; do sleep 0.1; done
"""


def environment(**own) -> dict[str, str]:
  """This process's, without what says of a cluster or a device."""
  kept = {k: v for k, v in os.environ.items() if not CLUSTER.match(k)}
  return {**kept, "JAX_PLATFORMS": "cpu", **own}


def launch(name, *arguments, cwd=ROOT, code=0, **own) -> str:
  """What a launcher prints; it must end with `code`."""
  done = subprocess.run(
    [cwd / "launch" / name, *arguments],
    cwd=cwd,
    env=environment(**own),
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert done.returncode == code, done.stderr
  return done.stdout if code == 0 else done.stdout + done.stderr


def commands(text: str) -> list[tuple[dict, list[str]]]:
  """(variables, words) of every command of a dry run."""
  found = []
  for words in map(shlex.split, text.splitlines()):
    assert words.pop(0) == "env"
    variables = {}
    while "=" in words[0]:
      name, value = words.pop(0).split("=", 1)
      variables[name] = value
    found.append((variables, words))
  return found


def write_program(path: pathlib.Path, text: str = PROGRAM) -> str:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text)
  path.chmod(0o755)
  return str(path)


# --- dry runs ----------------------------------------------------------------


def test_shellcheck_finds_nothing():
  shellcheck = pathlib.Path(sys.executable).with_name("shellcheck")
  subprocess.run([shellcheck, "-x", *SCRIPTS], cwd=ROOT, check=True)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_bad_option_is_named(path):
  if path.name != "env.sh":
    assert "--gpu=1: " in launch(path.name, "--gpu=1", *RUN, code=2)


def test_local_dry_run():
  ((variables, words),) = commands(launch("local.sh", "--dry-run", *RUN))
  assert words[1:] == [
    "-m",
    "tensorar_jax.main",
    "--config=configs/digits.py",
    "--mode=train",
    "--workdir=a b",
  ]
  assert variables["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
  assert "latency_hiding" in variables["XLA_FLAGS"]
  mine = launch("local.sh", "--dry-run", *RUN, XLA_FLAGS="--mine=1")
  assert commands(mine)[0][0]["XLA_FLAGS"].endswith("=true --mine=1")


def test_local_processes_share_the_gpus():
  options = "--dry-run", "--processes=2"
  gpus = dict(JAX_PLATFORMS="", CUDA_VISIBLE_DEVICES="4,5,6,7")
  found = commands(launch("local.sh", *options, *RUN, **gpus))
  assert [v["CUDA_VISIBLE_DEVICES"] for v, _ in found] == ["4,5", "6,7"]
  (_, first), (_, second) = found
  assert first[:-1] == second[:-1] and "--num_processes=2" in first
  assert first[-1] == "--process_id=0" and second[-1] == "--process_id=1"
  assert re.fullmatch(r"--coordinator=127.0.0.1:\d+", first[-3])
  odd = "--dry-run", "--processes=3"
  assert "divisor of 4" in launch("local.sh", *odd, *RUN, code=2, **gpus)


@pytest.mark.parametrize("tasks", ["gpu", "node"])
def test_slurm_dry_run(tasks):
  job = dict(SLURM_JOB_ID="7", SLURM_JOB_NUM_NODES="3", SLURM_GPUS_ON_NODE="4")
  job |= dict(SLURM_CPUS_ON_NODE="64", SLURM_SUBMIT_DIR=str(ROOT))
  text = launch("slurm.sh", f"--tasks={tasks}", "--dry-run", *RUN, **job)
  ((variables, words),) = commands(text)
  assert words[0] == "srun" and words[-2:] == RUN[1:]
  each = dict(gpu=(12, 4, 16), node=(3, 1, 64))[tasks]
  names = "ntasks", "ntasks-per-node", "cpus-per-task"
  assert {f"--{n}={v}" for n, v in zip(names, each)} < set(words)
  ids = dict(gpu=None, node="0,1,2,3")[tasks]
  assert variables.get("JAX_LOCAL_DEVICE_IDS") == ids


def manifest(accelerator, *options) -> dict:
  return yaml.safe_load(
    launch(
      "k8s.sh",
      f"--accelerator={accelerator}",
      "--name=run-b",
      "--image=place/image:1",
      "--claim=disk",
      "--hosts=4",
      *options,
      "--dry-run",
      *RUN,
      TRICKY,
    )
  )


@pytest.mark.parametrize("accelerator", ["gpu", "tpu"])
def test_k8s_dry_run(accelerator):
  options = []
  if accelerator == "tpu":
    options = ["--tpu=tpu-v5-lite-podslice", "--topology=4x4"]
  found = manifest(accelerator, *options)
  assert found["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
  (workers,) = found["spec"]["replicatedJobs"]
  job = workers["template"]["spec"]
  assert job["parallelism"] == job["completions"] == 4
  assert job["completionMode"] == "Indexed"
  # 75 is saved and to be started again: the job says so, the set does it.
  codes = job["podFailurePolicy"]["rules"][0]
  assert (codes["action"], codes["onExitCodes"]["values"]) == ("FailJob", [75])
  (rule,) = found["spec"]["failurePolicy"]["rules"]
  assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
  assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
  pod = job["template"]["spec"]
  (main,) = pod["containers"]
  assert main["name"] == codes["onExitCodes"]["containerName"]
  assert main["image"] == "place/image:1"
  # What the user wrote stays what it is.
  assert main["command"][:2] == ["launch/local.sh", "configs/digits.py"]
  assert main["command"][-1] == '--config.x={"a": "$$(HOME)\\"}'
  claims = [v.get("persistentVolumeClaim") for v in pod["volumes"]]
  assert {"claimName": "disk"} in claims
  flags = main["command"][2:-3]
  if accelerator == "tpu":
    assert flags == ["--coordinator=auto"]
    assert main["resources"]["limits"]["google.com/tpu"] == 4
    selector = {k.rsplit("-", 1)[1]: v for k, v in pod["nodeSelector"].items()}
    assert selector["topology"] == "4x4"
  else:
    assert flags == [
      # <set>-<replicated job>-<job>-<pod>.<set>, as JobSet names pods.
      f"--coordinator=run-b-{workers['name']}-0-0.run-b:1234",
      "--num_processes=4",
      "--process_id=$(JOB_COMPLETION_INDEX)",
    ]
    assert main["resources"]["limits"]["nvidia.com/gpu"] == 8


def test_xpk_dry_run():
  options = "--name=run-b", "--cluster=pods", "--tpu=v5litepod-16"
  options += "--image=place/image:tpu", "--zone=z", "--dry-run"
  words = shlex.split(launch("xpk.sh", *options, *RUN, TRICKY))
  assert words[:3] == ["xpk", "workload", "create"]
  given = dict(word[2:].split("=", 1) for word in words[3:])
  assert given["docker-image"] == "place/image:tpu"
  assert given["tpu-type"] == "v5litepod-16" and given["zone"] == "z"
  assert given["restart-on-exit-codes"] == "75"
  # Kubernetes makes $$( a $( again, and then a shell reads the line.
  line = given["command"].replace("$$(", "$(")
  assert shlex.split(line)[3:] == [
    "exec",
    "launch/local.sh",
    RUN[0],
    "--coordinator=auto",
    *RUN[1:],
    TRICKY,
  ]


def test_sky_dry_run(tmp_path):
  options = "--name=run-b", "--volume=disk", "--gpus=A100:4", "--nodes=2"
  text = launch("sky.sh", *options, "--dry-run", *RUN, TRICKY)
  task = yaml.safe_load(text)
  assert (task["name"], task["num_nodes"]) == ("run-b", 2)
  assert task["resources"]["accelerators"] == "A100:4"
  assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
  assert task["volumes"] == {"/mnt/shared": "disk"}
  assert "-e '.[cuda13]'" in task["setup"]
  shellcheck = pathlib.Path(sys.executable).with_name("shellcheck")
  for name in ("setup", "run"):
    # SC2016: what the user wrote is not to be expanded.
    check = [shellcheck, "--shell=bash", "--exclude=SC2016", "-"]
    subprocess.run(check, input=task[name], text=True, check=True)
  # What the second of the nodes starts.
  node = environment(
    SKYPILOT_NODE_IPS="10.0.0.1\n10.0.0.2",
    SKYPILOT_NUM_NODES="2",
    SKYPILOT_NODE_RANK="1",
    PYTHON=write_program(tmp_path / "python", '#!/bin/sh\nprintf "%s\\n" "$@"'),
  )
  done = subprocess.run(
    ["bash", "-c", task["run"]], cwd=ROOT, env=node, capture_output=True
  )
  assert done.stdout.decode().splitlines()[2:] == [
    f"--config={RUN[0]}",
    "--coordinator=10.0.0.1:1234",
    "--num_processes=2",
    "--process_id=1",
    *RUN[1:],
    TRICKY,
  ]


def test_the_images_are_for_gpus_and_tpus_and_have_no_rights():
  text = (ROOT / "launch" / "Dockerfile").read_text()
  stages = re.findall(r"^FROM (\S+) AS (\S+)$", text, re.M)
  assert dict((name, base) for base, name in stages[-2:]) == {
    "tpu": "runtime",
    "gpu": "runtime",
  }
  runtime = text.split("AS runtime\n")[1]
  assert "USER 1000\n" in runtime and "USER root" not in text
  (base,) = re.findall(r"^ARG BASE=(\S+)", text, re.M)
  assert re.fullmatch(r"python:3\.12\.\d+-slim-\w+", base)
  for extra in re.findall(r"/app\[([^]]+)\]|ARG CUDA=(\w+)", text):
    for name in filter(None, ",".join(extra).split(",")):
      assert name == "${CUDA}" or name in EXTRAS, name
  for launcher in ("k8s.sh", "xpk.sh"):
    assert "launch/Dockerfile" in (ROOT / "launch" / launcher).read_text()


@pytest.mark.parametrize("accelerator", ["gpu", "tpu"])
def test_pods_have_no_rights_and_bounded_memory(accelerator):
  options = []
  if accelerator == "tpu":
    options = ["--tpu=tpu-v5-lite-podslice", "--topology=4x4"]
  pods = []
  for more in ([], ["--memory=200Gi"], ["--per-host=1"]):
    (workers,) = manifest(accelerator, *options, *more)["spec"][
      "replicatedJobs"
    ]
    pods.append(workers["template"]["spec"]["template"]["spec"])
  rights = pods[0]["securityContext"]
  assert rights["runAsNonRoot"] is True and rights["runAsUser"] == 1000
  assert rights["seccompProfile"] == {"type": "RuntimeDefault"}
  assert pods[0]["automountServiceAccountToken"] is False
  (main,) = pods[0]["containers"]
  assert main["securityContext"] == {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
  }
  assert [
    p["containers"][0]["resources"]["limits"]["memory"] for p in pods
  ] == [
    dict(gpu="128Gi", tpu="64Gi")[accelerator],
    "200Gi",
    "16Gi",
  ]


# What would be more YAML, or another type there, or a flag of another program.
K8S = ["--accelerator=gpu", "--name=run-b", "--image=i:1", "--claim=disk"]
K8S_TPU = ["--accelerator=tpu", *K8S[1:], "--tpu=v5", "--topology=4x4"]
SKY = ["--name=b", "--volume=disk"]
POD = ["--name=pod", "--zone=z"]
BAD = [
  *(("k8s.sh", K8S, f"--claim={v}") for v in ("d\n- x: y", "a}", "A b", "-a")),
  *(("k8s.sh", K8S, f"--image={v}") for v in ('a", "b', "a b", "[a]", "-a")),
  *(("k8s.sh", K8S, f"--name={v}") for v in ("a\nkind: Pod", "a: b", "Ab")),
  *(("k8s.sh", K8S, f"--hosts={v}") for v in ("0", "1\n", "1e9", "9999999")),
  *(("k8s.sh", K8S, f"--memory={v}") for v in ("1Gi\nx: y", "all", "-1Gi")),
  *(("k8s.sh", K8S_TPU, f"--tpu={v}") for v in ("a: b", "a #b", "{a}")),
  *(("k8s.sh", K8S_TPU, f"--topology={v}") for v in ("4x4\na: b", "4", "x")),
  ("k8s.sh", K8S, "--tpu=v5"),
  *(("tpu_pod.sh", POD, f"--name={v}") for v in ("--flag", "a b", "a:b")),
  *(("tpu_pod.sh", POD, f"--zone={v}") for v in ("--flag", "a b")),
  ("tpu_pod.sh", POD, "--project=a b"),
  *(("sky.sh", SKY, f"--volume={v}") for v in ("a\nrun: x", "{FLAGS}")),
  *(("sky.sh", SKY, f"--gpus={v}") for v in ("a\nb: c", "H100: 8")),
  *(("sky.sh", SKY, f"--infra={v}") for v in ("k\nb: c", "a: b")),
]


@pytest.mark.parametrize("script, options, bad", BAD)
def test_values_are_checked_before_they_are_pasted(script, options, bad):
  text = launch(script, *options, bad, "--dry-run", *RUN, code=2)
  assert text.startswith("error: ") and bad.split("=")[0] in text


@pytest.mark.parametrize("script, options", [("k8s.sh", K8S), ("sky.sh", SKY)])
def test_texts_of_yaml_stay_texts(script, options):
  name = "no" if script == "k8s.sh" else "on"
  disk = "--claim=1e3" if script == "k8s.sh" else "--volume=1e3"
  found = yaml.safe_load(
    launch(script, *options, f"--name={name}", disk, "--dry-run", *RUN)
  )
  if script == "k8s.sh":
    (workers,) = found["spec"]["replicatedJobs"]
    pod = workers["template"]["spec"]["template"]["spec"]
    assert found["metadata"]["name"] == "no"
    claim = pod["volumes"][0]["persistentVolumeClaim"]["claimName"]
  else:
    assert found["name"] == "on"
    (claim,) = found["volumes"].values()
  assert claim == "1e3"
  for word in ("a\tb", "a\x07"):
    text = launch(script, *options, "--dry-run", *RUN, word, code=2)
    assert "a line break or the like in $'a" in text


def test_gpu_check_expands_a_home_and_refuses_a_url(tmp_path):
  home = dict(HOME=str(tmp_path), PYTHON="true")
  launch("gpu_check.sh", "--output=~/a b", "--parts=speed", **home)
  assert (tmp_path / "a b").is_dir()
  text = launch("gpu_check.sh", "--output=gs://b/run", code=2, **home)
  assert "expected folders of this machine" in text


# --- local.sh with several processes -----------------------------------------


def start(tmp_path, **own) -> subprocess.Popen:
  program = write_program(tmp_path / "program")
  return subprocess.Popen(
    [ROOT / "launch" / "local.sh", "--processes=2", *RUN],
    env=environment(PYTHON=program, **{"CODE": "", "DEAF": "", **own}),
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def test_a_signal_reaches_all(tmp_path):
  process = start(tmp_path)
  first = [process.stdout.readline() for _ in range(2)]
  assert all("started" in line for line in first)
  process.send_signal(signal.SIGTERM)
  rest = process.communicate(timeout=30)[0]
  assert process.returncode == 75
  assert sorted(rest.split()) == ["[1]", "stopped", "stopped"]


@pytest.mark.parametrize("deaf", ["", "1"])
def test_the_first_failure_stops_the_others(tmp_path, deaf):
  started = time.monotonic()
  process = start(tmp_path, CODE="3", DEAF=deaf, GRACE="1")
  text = process.communicate(timeout=30)[0]
  assert process.returncode == 3
  assert ("stopped" in text) == (not deaf)
  assert time.monotonic() - started < 20


# --- the others with stand-ins for what they call -----------------------------


@pytest.fixture
def project(tmp_path) -> pathlib.Path:
  """A copy of the launchers in a repository of its own, and stand-ins."""
  folder = tmp_path / "project"
  shutil.copytree(ROOT / "launch", folder / "launch")
  (folder / "requirements.txt").touch()
  subprocess.run(["git", "init", "-q", folder], check=True)
  return folder


@pytest.mark.parametrize(
  "code, state, again",
  [(75, "RUNNING", True), (75, "COMPLETING", False), (1, "RUNNING", False)],
)
def test_slurm_goes_back_to_the_queue(tmp_path, code, state, again):
  stubs, log = tmp_path / "bin", tmp_path / "log"
  write_program(stubs / "srun", f"#!/bin/sh\nexit {code}\n")
  write_program(stubs / "squeue", f"#!/bin/sh\necho {state}\n")
  write_program(stubs / "scontrol", f'#!/bin/sh\necho "$@" > {log}\n')
  job = dict(SLURM_JOB_ID="7", SLURM_JOB_NUM_NODES="1", SLURM_GPUS_ON_NODE="8")
  path = f"{stubs}:{os.environ['PATH']}"
  launch("slurm.sh", *RUN, code=code, PATH=path, **job)
  assert (log.read_text() if log.exists() else "") == "requeue 7\n" * again


def test_tpu_pod_starts_and_stops_on_a_host(tmp_path, project):
  """Against a stand-in for gcloud whose one host is a folder."""
  stubs, host = tmp_path / "bin", tmp_path / "host"
  host.mkdir()
  write_program(
    stubs / "gcloud",
    f"""#!/usr/bin/env bash
[[ "$1 $2 $3" == "compute tpus tpu-vm" && $* == *"--zone=z --worker=all"* ]]
if [[ $4 == scp ]]; then cp "$5" {host}; exit; fi
command=${{!#}}
cd {host} && bash -c "${{command#--command=}}"
""",
  )
  program = write_program(tmp_path / "program")
  write_program(
    stubs / "python3.11",
    "#!/bin/sh\nmkdir -p .venv/bin\nln -s /bin/true .venv/bin/pip\n"
    f"cp {program} .venv/bin/python\n",
  )
  # A folder for temporary files that a shell must not read as a command.
  odd = tmp_path / "a b; touch $HOME;'"
  odd.mkdir()
  own = dict(PATH=f"{stubs}:{os.environ['PATH']}", CODE="", DEAF="")
  own |= dict(TMPDIR=str(odd))
  pod = "--name=pod", "--zone=z"
  dry = launch("tpu_pod.sh", *pod, "--dry-run", *RUN, cwd=project, **own)
  words = shlex.split(dry)
  steps = [words[i + 4] for i, word in enumerate(words) if word == "gcloud"]
  assert steps == ["scp", "ssh"]
  assert not list(host.iterdir())
  launch("tpu_pod.sh", *pod, *RUN, cwd=project, **own)
  log = host / "tensorar_jax" / "run.log"
  wait_for(lambda: log.read_text())
  assert log.read_text().split("main ")[1] == (
    "--config=configs/digits.py --coordinator=auto --mode=train --workdir=a b\n"
  )
  text = launch("tpu_pod.sh", *pod, *RUN, cwd=project, code=1, **own)
  assert "under way" in text
  launch("tpu_pod.sh", *pod, "--action=stop", cwd=project, **own)
  wait_for(lambda: "stopped" in log.read_text())


def wait_for(done) -> None:
  deadline = time.monotonic() + 20
  while not done():
    assert time.monotonic() < deadline
    time.sleep(0.05)


# --- how a process finds the others -------------------------------------------


@pytest.fixture
def joined(monkeypatch) -> list:
  """What `jax.distributed.initialize` is called with; no cluster around."""
  for name in os.environ:
    if CLUSTER.match(name):
      monkeypatch.delenv(name)
  calls = []
  record = lambda *args, **kwargs: calls.append((args, kwargs))
  monkeypatch.setattr(jax.distributed, "initialize", record)
  return calls


@pytest.mark.parametrize(
  "variables, found",
  [
    ({}, False),
    ({"SLURM_STEP_NUM_TASKS": "2"}, True),
    ({"SLURM_STEP_NUM_TASKS": "1"}, False),  # as in `srun --pty bash`
    ({"OMPI_COMM_WORLD_SIZE": "8"}, True),
    ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
    ({"TPU_WORKER_HOSTNAMES": "t-0,t-1"}, True),
    ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
  ],
)
def test_clusters_are_recognised(joined, monkeypatch, variables, found):
  for name, value in variables.items():
    monkeypatch.setenv(name, value)
  processes.join_processes()
  assert [args for args, _ in joined] == [(None, None, None)] * found
  if found:  # the cluster is asked
    assert joined[0][1]["cluster_detection_method"] is None


def test_flags_come_before_the_cluster(joined, monkeypatch):
  monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
  processes.join_processes("host:1", 2, 1)
  ((args, options),) = joined
  assert args == ("host:1", 2, 1)
  assert options["cluster_detection_method"] == "deactivate"
  with pytest.raises(ValueError, match="expected all three"):
    processes.join_processes("auto", 2, 1)


def test_two_tasks_of_slurm_find_one_another():
  """As srun starts them; JAX makes the coordinator of the list of nodes.

  The second then fails, and ends: it does not wait for the first.
  """
  step = dict(SLURM_JOB_ID="7", SLURM_STEP_NODELIST="127.0.0.1")
  step |= dict(SLURM_NTASKS="2", SLURM_STEP_NUM_TASKS="2")
  code = (
    "import jax, time; from tensorar_jax.parallel import processes\n"
    "processes.join_processes()\n"
    "print(jax.process_index(), jax.process_count(), flush=True)\n"
    "if jax.process_index(): processes.fail('error: alone')\n"
    "time.sleep(60)"
  )
  first, second = (
    subprocess.Popen(
      [sys.executable, "-c", code],
      cwd=ROOT,
      env=environment(**step, SLURM_PROCID=str(i), SLURM_LOCALID=str(i)),
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  )
  try:
    text, errors = second.communicate(timeout=50)
    assert text == "1 2\n" and errors.endswith("error: alone\n")
    assert second.returncode == 1
    assert first.stdout.readline() == "0 2\n"
  finally:
    first.kill()
    second.kill()
    first.communicate()

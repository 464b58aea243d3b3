"""The diagnosis of this machine, and of machines that are worse off."""

import hashlib
import json
import shutil
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

from marlin_tools.ops import CheckResult
from marlin_tools.resources import demo_dir
from marlin_tools.verification import doctor
from marlin_tools.verification.doctor import diagnose


def fact(name):
    (found,) = (each for each in diagnose() if each.name == name)
    return found


def test_a_healthy_machine():
    facts = diagnose()

    names = [each.name for each in facts]
    assert len(set(names)) == len(names)
    assert {"python", "torch", "lm-eval", "driver", "cpu", "memory", "disk here", "hub cache", "demo model"} <= set(names)
    assert [] == [each for each in facts if each.status == "problem"]
    assert all(each.hint for each in facts if each.status != "ok")
    assert [asdict(each) for each in facts] == json.loads(json.dumps([asdict(each) for each in facts]))


def test_listed_sums_cover_the_demo_model():
    """After the model has changed: cd marlin_tools/demo && sha256sum model/* > SHA256SUMS."""
    listed = dict(line.split()[::-1] for line in (demo_dir() / "SHA256SUMS").read_text().splitlines())
    files = sorted((demo_dir() / "model").iterdir())

    assert {f"model/{file.name}": hashlib.sha256(file.read_bytes()).hexdigest() for file in files} == listed


@pytest.fixture
def other_demo(tmp_path, monkeypatch):
    shutil.copytree(demo_dir() / "model", tmp_path / "model")
    files = [tmp_path / "model" / "model.safetensors", tmp_path / "model" / "tokenizer.json"]
    lines = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  model/{file.name}" for file in files]
    (tmp_path / "SHA256SUMS").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(doctor, "demo_dir", lambda: tmp_path)
    return tmp_path


def test_a_flipped_bit_in_the_demo_model(other_demo):
    weights = other_demo / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)

    assert ("problem", "damaged: model/model.safetensors") == (fact("demo model").status, fact("demo model").value)


def test_an_intact_demo_model(other_demo):
    assert ("ok", "intact, 2 files") == (fact("demo model").status, fact("demo model").value)


def test_a_lost_file_of_the_demo_model(other_demo):
    (other_demo / "model" / "tokenizer.json").unlink()

    assert "problem" == fact("demo model").status


def test_a_missing_package_is_a_problem_or_a_note(monkeypatch):
    def version(package):
        if package in {"datasets", "compressed-tensors"}:
            raise doctor.PackageNotFoundError(package)
        return "1.0"

    monkeypatch.setattr(doctor, "version", version)

    assert ("absent", "problem") == (fact("datasets").value, fact("datasets").status)
    assert ("absent", "note") == (fact("compressed-tensors").value, fact("compressed-tensors").status)


def test_offline_flags(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert ("note", True) == (fact("offline").status, "HF_HUB_OFFLINE" in fact("offline").value)
    for flag in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(flag, raising=False)
    assert ("ok", "no") == (fact("offline").status, fact("offline").value)


DRIVER = "NVRM version: NVIDIA UNIX {}  580.95.05  Tue Sep 23\nGCC version: 12.3"


@pytest.mark.parametrize("kind", ("x86_64 Kernel Module", "Open Kernel Module for x86_64"))
def test_driver_version(tmp_path, monkeypatch, kind):
    file = tmp_path / "version"
    file.write_text(DRIVER.format(kind))
    monkeypatch.setattr(doctor, "Path", lambda _name: file)

    assert "580.95.05" == doctor._driver()


def test_a_driver_that_torch_cannot_use(monkeypatch):
    monkeypatch.setattr(doctor, "_driver", lambda: "580.95.05")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert ("problem", True) == (fact("torch").status, "install a CUDA build" in fact("torch").hint)

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert "problem" == fact("gpu").status


@pytest.mark.parametrize(("capability", "status"), (((7, 5), "problem"), ((8, 0), "ok"), ((9, 0), "ok")))
def test_gpus(monkeypatch, capability, status):
    gpu = SimpleNamespace(name="A GPU", major=capability[0], minor=capability[1], total_memory=80 * 10**9)
    monkeypatch.setattr(doctor, "_driver", lambda: "580.95.05")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _index: gpu)
    monkeypatch.setattr(doctor.ops, "self_test", lambda _device: [CheckResult("8x64 float16", passed=True, detail="")])

    found = fact("cuda:0")
    assert (f"A GPU, capability {capability[0]}.{capability[1]}, 80 GB", status) == (found.value, found.status)


def no_compiler(_device):
    raise RuntimeError("no compiler\nand more")


@pytest.mark.parametrize(
    ("outcome", "value", "status"),
    (
        (lambda _device: [CheckResult("8x64", passed=True, detail="")], "all 1 agree with the reference", "ok"),
        (
            lambda _device: [CheckResult("a", passed=True, detail=""), CheckResult("b", passed=False, detail="nan")],
            "1 of 2 are wrong, first b: nan",
            "problem",
        ),
        (no_compiler, "cannot be tried: no compiler", "problem"),
    ),
)
def test_kernels(monkeypatch, outcome, value, status):
    monkeypatch.setattr(doctor.ops, "self_test", outcome)

    assert (value, status) == (doctor._kernels(0).value, doctor._kernels(0).status)


def test_a_gpu_that_does_not_answer(monkeypatch):
    def fail(_index):
        raise RuntimeError("CUDA driver version is insufficient\nmore")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", fail)

    assert ("CUDA driver version is insufficient", "problem") == (fact("gpu").value, fact("gpu").status)

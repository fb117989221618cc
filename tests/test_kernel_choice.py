"""Which kernel runs on which device, and the reason where fla's cannot."""

import importlib.metadata
import re
import types
from pathlib import Path

import pytest
import torch
import yaml
from teachers import tiny_teacher

from hf_hybrid import cli
from hf_hybrid.conversion import convert
from hf_hybrid.environment import describe_kernels
from hf_hybrid.modeling import kernels
from hf_hybrid.run.folder import ARTEFACTS
from hf_hybrid.teacher.loading import load_model


class TestChoice:
    def test_cpu_tensors_never_go_to_fla(self):
        assert not kernels.use_fla(torch.device("cpu"), "auto")
        assert not kernels.use_fla(torch.device("cuda"), "torch")

    def test_forced_fla_says_why_not(self):
        with pytest.raises(ValueError, match="tensors are on 'cpu'"):
            kernels.use_fla(torch.device("cpu"), "fla")

    def test_widths_that_no_device_has_are_named_on_any(self):
        """By what mixers call, as by the operators themselves."""
        q = torch.randn(1, 3, 2, 8)
        logits = {"decay": q[..., 0], "write": q[..., 1], "A_log": torch.zeros(2), "dt_bias": torch.zeros(2)}
        with pytest.raises(ValueError, match="fla needs 16 channels or more, and heads have 8"):
            kernels.delta_rule_of_logits("gated_delta_rule", q, q, q, **logits, kernel="fla")

    def test_reason(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert kernels.why_not_fla() == "torch sees no CUDA device"
        with pytest.raises(ValueError, match="torch sees no CUDA device"):
            kernels.use_fla(torch.device("cuda"), "fla")
        assert not kernels.use_fla(torch.device("cuda"), "auto")

    @pytest.mark.parametrize(
        ("package", "version", "reason"),
        [
            ("triton", "3.3.1", None),
            ("triton", "3.5.0", "3.5.0 computes wrong gradients on Hopper"),
            ("triton", "3.7.0", "3.7.0 computes wrong gradients on Hopper"),
            ("triton", "3.7.0rc1+git1234", "3.7.0 computes wrong gradients on Hopper"),
            ("triton", "3.7.1", None),
            ("pytorch-triton", "3.6.0+git9844da95", "3.6.0 computes wrong gradients on Hopper"),
            ("pytorch-triton", "3.8.0+git9844da95", None),
            ("another-triton", "3.8.0", "triton's version is unknown"),
        ],
    )
    def test_triton_versions_with_wrong_gradients_on_hopper(self, monkeypatch, package, version, reason):
        installed_with(monkeypatch, package, version)
        found = kernels.why_not_fla()
        assert (found is None) if reason is None else (reason in found)

    def test_a_gpu_of_another_maker_is_no_hopper(self, monkeypatch):
        installed_with(monkeypatch, "triton", "3.5.0")
        monkeypatch.setattr(torch.version, "hip", "6.4")
        assert kernels.why_not_fla() is None


class TestWhatIsSaid:
    """A fallback is never silent: at the start of a run, and once where it happens."""

    def test_on_a_cpu(self):
        assert describe_kernels(torch.device("cpu")) == (
            "the recurrences run in torch on cpu; fla's kernels need a CUDA device"
        )
        with pytest.raises(ValueError, match="kernel='fla' cannot run: the tensors are on 'cpu'"):
            describe_kernels(torch.device("cpu"), "fla")

    def test_on_hopper(self, monkeypatch):
        cuda = torch.device("cuda")
        installed_with(monkeypatch, "triton", "3.6.0")
        said = describe_kernels(cuda)
        assert said.startswith(
            "the recurrences run in torch on cuda, 7 to 9 times as slow as fla's kernels: triton 3.6.0"
        )
        with pytest.raises(ValueError, match="kernel='fla' cannot run: triton 3.6.0 computes wrong gradients"):
            describe_kernels(cuda, "fla")
        installed_with(monkeypatch, "triton", "3.7.1")
        kernels.why_not_fla.cache_clear()
        assert describe_kernels(cuda) == "the recurrences run in fla's kernels on cuda (triton 3.7.1)"
        assert describe_kernels(cuda, "torch").endswith("kernel='torch' asks for it")

    def test_where_auto_falls_back(self, monkeypatch, caplog):
        """Of tensors on a GPU, which there is none of here."""
        monkeypatch.setattr(kernels, "use_fla", lambda device, kernel: False)
        monkeypatch.setattr(kernels, "why_not_fla", lambda: "triton 3.6.0 computes wrong gradients on Hopper")
        said = []
        monkeypatch.setattr(kernels.logger, "warning_once", said.append)
        shape, device = types.SimpleNamespace(shape=(1, 4, 2, 16)), torch.device("cuda")
        operands = types.SimpleNamespace(shape=(1, 4, 2, 16), dtype=torch.bfloat16, device=device)
        for kernel in ("torch", "auto"):
            assert not kernels._runs_on_fla("gla", {"q": shape, "v": operands}, kernel)
        assert len(said) == 1 and "3.6.0 computes wrong gradients on Hopper. The torch form" in said[0]

    def test_the_extra_asks_for_a_triton_that_may_be_used(self):
        (triton,) = re.findall(r'"triton>=([\d.]+)"', Path(__file__).parents[1].joinpath("setup.py").read_text())
        assert tuple(map(int, triton.split("."))) == kernels._BROKEN_ON_HOPPER[1]


@pytest.mark.parametrize("kernel", ["torch", "fla", None])
def test_a_model_is_loaded_with_the_kernel_of_whoever_loads_it(kernel, tmp_path):
    convert(tiny_teacher(), [1]).save_pretrained(tmp_path)
    model = load_model(tmp_path, kernel=kernel)
    assert model.config.kernel == model.model.layers[0].self_attn.kernel == (kernel or "auto")


def test_commands_say_it_first(case):
    """And a recipe that asks for fla where it cannot run is refused before anything is made."""
    case.recipe["execution"] = {"use_cpu": True, "kernel": "fla"}
    case.recipe["training"] = {}
    code, line = case.run()
    assert code == 2 and line.startswith("hf-hybrid: kernel='fla' cannot run: the tensors are on 'cpu'")
    assert not any(case.folder.joinpath(name).exists() for name in ARTEFACTS.values())
    case.recipe["execution"]["kernel"] = "auto"
    Path("recipe.yaml").write_text(yaml.safe_dump(case.recipe))
    assert cli.main(["run", "recipe.yaml", "--output", str(case.folder), "--stop-after", "data"]) == 0
    said = case.capsys.readouterr().err
    assert said.index("the recurrences run in torch on cpu") < re.search(r"^\d+/\d+ data", said, re.M).start()
    assert cli.main(["evaluate", str(case.finished / "model")]) == 0
    assert "the recurrences run in torch on cpu" in case.capsys.readouterr().err


@pytest.fixture(autouse=True)
def asked_anew():
    """The reason is found once a process."""
    kernels.why_not_fla.cache_clear()
    yield
    kernels.why_not_fla.cache_clear()


def installed_with(monkeypatch, package, version):
    """A GPU of capability 9.0, fla, and a package of triton with this name and version."""

    def version_of(name):
        if name != package:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(kernels.importlib.metadata, "version", version_of)
    monkeypatch.setattr(kernels.importlib, "import_module", lambda name: None)
    monkeypatch.setattr(kernels, "tune_norms_by_width", lambda: None)

"""Which kernel runs on which device, and the reason where fla's cannot."""

import importlib.metadata

import pytest
import torch

from hf_hybrid.modeling import kernels


class TestChoice:
    def test_cpu_tensors_never_go_to_fla(self):
        assert not kernels.use_fla(torch.device("cpu"), "auto")
        assert not kernels.use_fla(torch.device("cuda"), "torch")

    def test_forced_fla_says_why_not(self):
        with pytest.raises(RuntimeError, match="tensors are on 'cpu'"):
            kernels.use_fla(torch.device("cpu"), "fla")

    def test_reason(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert kernels.why_not_fla() == "torch sees no CUDA device"
        with pytest.raises(RuntimeError, match="torch sees no CUDA device"):
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

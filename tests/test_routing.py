"""Who serves a call, who says so, and who may know what."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import fastloss
from fastloss import losses, routing

X, Y = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, 0])
PACKAGE = Path(fastloss.__file__).parent


def run(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, **environment})


def test_explain_names_backend_path_and_reason() -> None:
    route = fastloss.explain(fastloss.cross_entropy, X, Y)
    assert (route.backend, route.path) == ("numba", "kernel")
    assert route.reason


def test_explain_computes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("computed")

    monkeypatch.setattr("fastloss.losses.cross_entropy.forward", refuse)
    monkeypatch.setattr(F, "cross_entropy", refuse)
    fastloss.explain(fastloss.cross_entropy, X, Y)
    fastloss.explain(fastloss.cross_entropy, X.int(), Y)
    with pytest.raises(AssertionError, match="computed"):
        fastloss.cross_entropy(X, Y)


@pytest.mark.parametrize("name", ["CrossEntropyLoss", "NLLLoss"])
def test_explain_takes_modules_and_any_callable(name: str) -> None:
    assert fastloss.explain(getattr(fastloss, name)(), X, Y).path == "kernel"
    assert fastloss.explain(lambda x: fastloss.nll_loss(x, Y), X).path == "kernel"


def test_explain_of_something_else_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="did not call a fastloss function"):
        fastloss.explain(F.cross_entropy, X, Y)


def test_explain_leaves_no_trace_when_it_raises() -> None:
    with pytest.raises(ZeroDivisionError):
        fastloss.explain(lambda: 1 / 0)
    torch.testing.assert_close(fastloss.cross_entropy(X, Y), F.cross_entropy(X, Y))


@pytest.mark.parametrize("function", ["cross_entropy", "nll_loss"])
def test_small_inputs_go_to_torch_by_default(monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    worth = getattr(losses, function).worth
    monkeypatch.setattr(fastloss.config, "min_numel", X.numel() / worth.forward / worth.few)  # X has fewer than 16 classes
    route = fastloss.explain(getattr(fastloss, function), X[:5], Y[:5])
    assert route.path == "torch"
    assert "min_numel" in route.reason
    torch.testing.assert_close(getattr(fastloss, function)(X[:5], Y[:5]), getattr(F, function)(X[:5], Y[:5]))
    assert fastloss.explain(getattr(fastloss, function), X, Y).path == "kernel"


def test_rows_of_16_classes_have_the_whole_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastloss.config, "min_numel", 2000)
    fifteen, sixteen = (torch.randn(240 // 15, 15), torch.randn(240 // 16, 16))
    assert fastloss.explain(fastloss.cross_entropy, fifteen, torch.zeros(16, dtype=torch.int64)).path == "kernel"
    assert fastloss.explain(fastloss.cross_entropy, sixteen, torch.zeros(15, dtype=torch.int64)).path == "torch"


def test_half_precision_has_a_higher_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    worth = losses.cross_entropy.worth
    assert worth.half > 1
    monkeypatch.setattr(fastloss.config, "min_numel", int(240 / worth.forward / (1 + worth.half) * 2))
    logits, target = torch.randn(15, 16), torch.zeros(15, dtype=torch.int64)
    assert fastloss.explain(fastloss.cross_entropy, logits, target).path == "kernel"
    assert fastloss.explain(fastloss.cross_entropy, logits.bfloat16(), target).path == "torch"
    assert fastloss.explain(fastloss.cross_entropy, logits.bfloat16()[:, :15], target).path == "kernel"  # few classes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classes", [15, 16])
@pytest.mark.parametrize("wanted", [True, False])
def test_the_first_look_at_a_size_decides_as_the_last(
    monkeypatch: pytest.MonkeyPatch, wanted: bool, classes: int, dtype: torch.dtype
) -> None:
    """`tiny` takes short cuts."""
    monkeypatch.setattr(fastloss.config, "min_numel", 4000)
    worth = losses.cross_entropy.worth
    for rows in range(1, 200):
        logits = torch.randn(rows, classes).to(dtype).requires_grad_(wanted)
        found = fastloss.explain(fastloss.cross_entropy, logits, torch.zeros(rows, dtype=torch.int64))
        assert routing.tiny(logits, worth) == (found.path == "torch")


def test_a_loss_for_every_row_has_a_higher_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, target = torch.randn(15, 16).requires_grad_(), torch.zeros(15, dtype=torch.int64)
    for function, labels in ((fastloss.cross_entropy, target), (fastloss.binary_cross_entropy_with_logits, torch.rand(15, 16))):
        worth = losses.cross_entropy.worth if labels is target else losses.bce_with_logits.worth
        assert worth.none > 1
        monkeypatch.setattr(fastloss.config, "min_numel", int(240 / worth.step / (1 + worth.none) * 2))
        assert fastloss.explain(function, logits, labels).path == "kernel"
        assert fastloss.explain(function, logits, labels, reduction="none").path == "torch"


def test_a_step_and_a_forward_alone_have_limits_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    step, forward, *_ = losses.cross_entropy.worth
    assert step < forward
    monkeypatch.setattr(fastloss.config, "min_numel", int(2 * 15 * 16 / (step + forward)))
    logits, target = torch.randn(15, 16), torch.zeros(15, dtype=torch.int64)
    assert fastloss.explain(fastloss.cross_entropy, logits, target).path == "torch"
    assert fastloss.explain(fastloss.cross_entropy, logits.requires_grad_(), target).path == "kernel"
    with torch.no_grad():
        assert fastloss.explain(fastloss.cross_entropy, logits, target).path == "torch"


def test_a_named_backend_serves_small_inputs_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastloss.config, "min_numel", 10**6)
    with fastloss.use_backend("numba"):
        assert fastloss.explain(fastloss.cross_entropy, X, Y).path == "kernel"


UNSERVED = {
    "dtype": lambda: (X.to(torch.float8_e4m3fn), Y),
    "device": lambda: (X.to("meta"), Y.to("meta")),
    "target dtype": lambda: (X, Y.int()),
    "not a tensor": lambda: (X, [1, 2]),
    "subclass": lambda: (X.as_subclass(type("Sub", (torch.Tensor,), {})), Y),
    "negative view": lambda: (torch._neg_view(X), Y),
    "conjugate-free complex": lambda: (X.to(torch.complex64), Y),
}


@pytest.mark.parametrize("kind", UNSERVED)
def test_what_the_kernels_do_not_serve_goes_to_torch_with_a_reason(kind: str) -> None:
    route = fastloss.explain(fastloss.cross_entropy, *UNSERVED[kind]())
    assert (route.backend, route.path) == ("torch", "torch")
    assert len(route.reason) > 10


def test_a_negative_view_gives_torchs_numbers() -> None:
    for function, args in (("cross_entropy", (Y,)), ("softmax", (1,))):
        torch.testing.assert_close(getattr(fastloss, function)(torch._neg_view(X), *args), getattr(F, function)(-X, *args))


def test_a_negative_view_as_upstream_gradient() -> None:
    gradients = []
    for module in (fastloss, F):
        leaf = X.clone().requires_grad_()
        module.cross_entropy(leaf, Y, reduction="none").backward(torch._neg_view(torch.arange(6.0)))
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


def test_a_zero_tensor_as_upstream_gradient() -> None:
    leaf = X.clone().requires_grad_()
    fastloss.cross_entropy(leaf, Y).backward(torch._efficientzerotensor(()))
    assert leaf.grad is None or (leaf.grad == 0).all()


def test_backend_torch_is_torch() -> None:
    with fastloss.use_backend("torch"):
        assert fastloss.explain(fastloss.cross_entropy, X, Y) == ("torch", "torch", "backend 'torch' was chosen")
        assert torch.equal(fastloss.cross_entropy(X, Y), F.cross_entropy(X, Y))


def test_a_named_backend_that_cannot_serve_is_an_error() -> None:
    with fastloss.use_backend("numba"):
        with pytest.raises(fastloss.BackendError, match=r"numba.*was chosen"):
            fastloss.cross_entropy(torch.randn(3, 5, dtype=torch.float64), torch.rand(3, 5), label_smoothing=0.1)
        with pytest.raises(IndexError, match=r"Target 9 is out of bounds."):
            fastloss.cross_entropy(X, Y + 9 - Y)
        torch.testing.assert_close(fastloss.cross_entropy(X, Y), F.cross_entropy(X, Y))


def test_a_named_backend_that_cannot_serve_is_an_error_under_a_compiler() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, y: fastloss.cross_entropy(x, y, label_smoothing=0.1), backend="eager")
    with fastloss.use_backend("numba"), pytest.raises(Exception, match=r"numba.*was chosen"):
        compiled(torch.randn(3, 5, dtype=torch.float64), torch.rand(3, 5))


def test_use_backend_restores_also_after_an_exception() -> None:
    before = fastloss.get_backend()
    with fastloss.use_backend("torch"):
        assert fastloss.get_backend() == "torch"
    with pytest.raises(ZeroDivisionError), fastloss.use_backend("torch"):
        1 / 0  # noqa: B018
    assert fastloss.get_backend() == before


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="backend must be one of auto, numba, triton, torch, got 'cuda'"):
        fastloss.set_backend("cuda")
    assert fastloss.get_backend() == "auto"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_triton_without_a_gpu_is_refused() -> None:
    with pytest.raises(fastloss.BackendError, match="'triton' cannot be used here"):
        fastloss.set_backend("triton")
    assert fastloss.get_backend() == "auto"


def test_environment_variable() -> None:
    script = "import fastloss, torch; print(fastloss.get_backend(), fastloss.explain(fastloss.softmax, torch.ones(99, 99), 1).backend)"
    assert run(script, FASTLOSS_BACKEND="torch").stdout.split() == ["torch", "torch"]
    assert run(script, FASTLOSS_BACKEND="numba").stdout.split() == ["numba", "numba"]
    bad = run(script, FASTLOSS_BACKEND="fast")
    assert bad.returncode
    assert "FASTLOSS_BACKEND must be one of" in bad.stderr


def test_import_loads_neither_numba_nor_triton() -> None:
    heavy = ["numba", "llvmlite", "triton", "fastloss.kernels.cpu", "fastloss.kernels.cuda", "torch.distributed.tensor"]
    script = f"import sys, fastloss; print([name for name in {heavy} if name in sys.modules])"
    assert run(script).stdout.strip() == "[]"


def test_a_first_call_that_goes_to_torch_loads_no_kernels() -> None:
    script = "import sys, torch, fastloss; fastloss.cross_entropy(torch.ones(2, 3), torch.tensor([0, 1]))"
    script += "; print('fastloss.kernels.cpu' in sys.modules)"
    assert run(script).stdout.strip() == "False"


# layer -> the modules of fastloss it may import (DESIGN.md, section 3)
LAYERS = {
    "_version": set(),
    "config": set(),
    "memory": {"config"},
    "loss": {"memory"},
    "storage": set(),
    "kinds": {"kernels.groups", "loss", "storage"},
    "element_launchers": {"kernels.groups", "kinds", "storage"},
    "launchers": {"element_launchers", "kernels.groups", "kinds"},
    "contract": {"element_launchers", "kinds", "launchers", "storage"},
    "backends": {"contract", "launchers"},
    "rows": {"backends", "loss", "memory", "storage"},
    "elements": {"backends", "loss", "rows", "storage"},
    "arguments": {"loss"},
    "chunks": {"config", "loss", "memory", "rows"},
    "sharded": set(),
    "torch_launchers": {"backends", "kernels.groups", "loss"},
    "slices": {"arguments", "kernels.groups", "loss", "rows", "sharded", "torch_launchers"},
    "losses": {
        "arguments",
        "backends",
        "chunks",
        "elements",
        "kernels.groups",
        "loss",
        "memory",
        "rows",
        "sharded",
        "slices",
        "torch_launchers",
    },
    "foresight": {"config", "loss"},
    "replay": {"config", "memory"},
    "record": {"config", "kernels.cpu.arguments", "kernels.cpu.launch", "memory", "replay", "storage"},
    "guards": set(),
    "calls": {"backends", "config", "contract", "foresight", "guards", "loss", "op_calls", "record", "replay", "routing"},
    "operation": {"arguments", "calls", "foresight", "loss"},
    "op_calls": {"guards", "config", "contract", "loss", "record", "replay"},
    "ops": {"loss", "losses", "op_calls", "replay", "storage"},
    "routing": {"backends", "config", "loss"},
    "serving": {"arguments", "calls", "config", "loss", "operation", "ops", "routing"},
    "composed": {"arguments", "chunks", "kernels.groups", "loss", "losses"},
    "vocab_parallel_linear": {
        "arguments",
        "backends",
        "chunks",
        "linear",
        "loss",
        "losses",
        "routing",
        "serving",
        "sharded",
        "vocab_parallel",
    },
    "dtensors": {"routing", "serving", "vocab_parallel"},
    "functional": {"arguments", "backends", "calls", "composed", "dtensors", "loss", "losses", "operation", "routing", "serving"},
    "linear": {"arguments", "chunks", "composed", "config", "loss", "losses", "routing", "serving", "statistics"},
    "sparse_targets": {"arguments", "composed", "losses", "rows", "serving"},
    "statistics": {"arguments", "composed", "losses", "routing", "serving", "sharded"},
    "vocab_parallel": {"arguments", "backends", "loss", "losses", "routing", "serving", "sharded"},
    "probabilities": {"arguments", "calls", "loss", "losses", "operation", "routing", "serving"},
    "modules": {"functional", "linear", "probabilities", "sparse_targets"},
}
# they are the other loss, of logits that they make, or of some of them
BUILT_ON = {"linear_token_statistics": {".token_statistics"}, "vocab_parallel_token_statistics": {".token_statistics"}}


def imports_of(path: Path) -> set[str]:
    """The fastloss modules and third-party packages that a file names in its import statements."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0:
                names.add((node.module or "").split(".")[0])
            elif node.module:
                names.add("." * node.level + (node.module if node.module.startswith("kernels.") else node.module.split(".")[0]))
            else:
                names |= {"." * node.level + alias.name for alias in node.names}
    return names


@pytest.mark.parametrize("layer", LAYERS)
def test_layers_import_only_what_they_may_know(layer: str) -> None:
    """A folder's files may import what the folder may, but not one another: they know no other loss."""
    files = [PACKAGE / f"{layer}.py"] if (PACKAGE / f"{layer}.py").exists() else list((PACKAGE / layer).glob("*.py"))
    for file in files:
        imported = imports_of(file)
        dots = "." if file.parent == PACKAGE else ".."
        if file.name != "__init__.py":
            assert {name for name in imported if name.startswith(".")} <= {dots + name for name in LAYERS[layer]} | BUILT_ON.get(
                file.stem, set()
            ), file
        assert not imported & {"numba", "triton", "llvmlite"}


def test_every_file_is_in_a_layer() -> None:
    above = {"__init__", "__main__", "doctor", "self_checks", "startup", "usual_calls", "bench", "integrations", "kernels"}
    found = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert found - above == set(LAYERS)


@pytest.mark.parametrize("package", ["cpu", "cuda"])
def test_kernels_import_nothing_of_fastloss(package: str) -> None:
    for path in (PACKAGE / "kernels" / package).glob("*.py"):
        imported = imports_of(path)
        assert "fastloss" not in imported, path.name
        assert {name for name in imported if name.startswith("..")} <= {"..groups"}, path.name
        assert not imported & ({"triton"} if package == "cpu" else {"numba", "llvmlite"}), path.name


def test_a_default_device_does_not_keep_the_kernels_away() -> None:
    with torch.device("meta"):  # new tensors without a device of their own would be without numbers
        assert fastloss.explain(fastloss.cross_entropy, X, Y).path == "kernel"
        loss = fastloss.cross_entropy(X, Y)
        element_wise = fastloss.binary_cross_entropy_with_logits(X, X.sigmoid())
    torch.testing.assert_close(loss, F.cross_entropy(X, Y))
    torch.testing.assert_close(element_wise, F.binary_cross_entropy_with_logits(X, X.sigmoid()))

"""Holds the layer table of docs/DESIGN.md and the house rules that a program can check, by reading the sources."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Top to bottom: a module may import its own layer and those below it. "vqfast" itself is the facade `import vqfast`.
LAYERS = ["__main__", "cli", "train", "data", "models", "vqfast", "compat", "nn", "tokens", "ops", "_backends"]
LAYERS += ["_border", "reference", "_files"]
# Where a rule of the second half of this file has a reason to be broken: path -> (rule, reason).
EXCEPTIONS: dict[str, tuple[str, str]] = {}


def python_files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] == "kernels":
        parts.insert(0, "vqfast")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_of(module: str) -> str:
    """`vqfast.ops.nearest` -> `ops`; `vqfast` -> `vqfast`; `vqfast.reference_x` -> `reference`; `torch.nn` -> ``."""
    package, _, rest = module.partition(".")
    if package != "vqfast":
        return ""
    return re.sub("^reference_.*", "reference", rest.partition(".")[0]) or "vqfast"


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return name == "vqfast.kernels" or path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def imports(path: Path) -> list[tuple[int, str, bool]]:
    """(line, absolute module, whether it is imported when the file is) of every import in a file."""
    tree = ast.parse(path.read_text(), str(path))
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    inside = {node for function in functions for node in ast.walk(function)}
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, node.module] if node.module else base)
            # `from vqfast import ops` imports the module vqfast.ops; `from vqfast import nearest` the facade.
            names = [f"{base}.{a.name}" if is_module(f"{base}.{a.name}") else base for a in node.names]
        else:
            continue
        found += [(node.lineno, name, node not in inside) for name in names]
    return found


@pytest.mark.parametrize("path", python_files("vqfast"), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down_only(path):
    own = layer_of(module_name(path))
    if path == ROOT / "vqfast/__init__.py":
        own = "models"  # the facade shows the public names of everything below the models
    assert own in LAYERS, f"{path}: not in the layer table; add it there and in docs/DESIGN.md"
    bad = []
    for line, module, at_import in imports(path):
        layer = layer_of(module)
        if layer == "kernels":
            if own not in ("_backends", "_border") or at_import:
                bad.append(f"line {line}: vqfast.kernels is imported by _backends and _border only, inside a function")
        elif layer and LAYERS.index(layer) < LAYERS.index(own):
            bad.append(f"line {line}: {own} may not import {module}, which is above it")
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize("path", sorted(ROOT.glob("vqfast/reference*.py")), ids=lambda p: p.name)
def test_the_reference_imports_torch_and_the_standard_library_only(path):
    packages = {module.split(".")[0] for _, module, _ in imports(path) if layer_of(module) != "reference"}
    assert packages <= {"torch", "math", "typing", "collections", "__future__"}


@pytest.mark.parametrize("path", python_files("kernels"), ids=lambda p: p.name)
def test_kernels_import_only_their_own_helpers(path):
    assert [m for _, m, _ in imports(path) if layer_of(m) not in ("", "kernels")] == []


def test_the_ops_package_re_exports_nothing():
    assert imports(ROOT / "vqfast/ops/__init__.py") == []


def test_importing_vqfast_imports_no_heavy_package():
    heavy = ["triton", "torch._dynamo", "matplotlib", "PIL", "tqdm", "safetensors", "vqfast.cli", "vqfast.train"]
    code = f"import sys, torch; old = set(sys.modules); import vqfast; print(set({heavy}) & set(sys.modules) - old)"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd="/")
    assert done.stdout.strip() == "set()", done.stderr


# ---- C++ ---------------------------------------------------------------------------------------------------------


def csrc(*patterns: str) -> list[Path]:
    return [path for pattern in patterns for path in sorted((ROOT / "csrc").rglob(pattern))]


def test_only_the_registration_files_know_torch():
    for path in csrc("*.cpp", "*.h", "*.cu", "*.cuh"):
        if path.parent == ROOT / "csrc" and path.name.startswith("register_"):
            continue
        found = re.findall(r"^\s*#\s*include\s*[<\"](?:torch|ATen|c10)/.*", path.read_text(), re.MULTILINE)
        assert not found, f"{path.name}: {found}"


def defined_functions(objects: list[Path]) -> dict[str, set[str]]:
    """Names of the functions in object files, by kind: T (one definition), W (inline: the linker keeps any copy)."""
    done = subprocess.run(["nm", "-C", "--defined-only", *objects], capture_output=True, text=True, check=True)
    rows = [line.split(" ", 2) for line in done.stdout.splitlines() if re.match(r"[0-9a-f]+ [A-Za-z] ", line)]
    return {kind: {name for _, k, name in rows if k == kind} for kind in "TW"}


def test_wide_simd_files_share_no_inline_function_with_others():
    """Else the linker may keep the copy with AVX-512 instructions for all, and older processors die of it."""
    objects = sorted((ROOT / "build/native/vqfast._C_cpu").rglob("*.o"))
    if not objects or not shutil.which("nm"):
        pytest.skip("native: no object files of this tree here (pip install -e . leaves them in build/), or no nm")
    wide = [path for path in objects if re.search(r"_avx\w+\.cpp", path.name)]
    for path in wide:
        others = defined_functions([other for other in objects if other != path])["W"]
        assert defined_functions([path])["W"] & others == set(), path.name


# ---- house rules -------------------------------------------------------------------------------------------------


def broken_rules(path: Path) -> list[tuple[int, str]]:
    """(line, rule) for pickle, eval, exec and shells."""
    picklers = ("pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib")
    found = [(line, "pickle") for line, module, _ in imports(path) if module.split(".")[0] in picklers]
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
        if name in ("eval", "exec"):
            found.append((node.lineno, "eval"))
        if name in ("os.system", "os.popen", "subprocess.getoutput") or keywords.get("shell", "False") != "False":
            found.append((node.lineno, "shell"))
        if name in ("torch.load", "torch.save") and keywords.get("weights_only") != "True":
            found.append((node.lineno, "pickle"))
        if name.endswith("np.load") and keywords.get("allow_pickle", "False") != "False" or name == "yaml.load":
            found.append((node.lineno, "pickle"))
        if "trust_remote_code" in keywords:
            found.append((node.lineno, "eval"))
    return found


def test_no_pickle_no_eval_no_shell():
    bad = []
    for path in python_files("vqfast", "kernels", "bench"):
        name = path.relative_to(ROOT).as_posix()
        allowed = EXCEPTIONS.get(name, ("", ""))[0]
        bad += [f"{name}:{line}: {rule}" for line, rule in broken_rules(path) if rule != allowed]
    assert not bad, "\n".join(bad)


def test_the_rule_for_pickle_and_shell_finds_them(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    bad = ["import pickle", "eval('1')", "subprocess.run('ls', shell=True)", "torch.load('x')", "os.system('ls')"]
    (tmp_path / "bad.py").write_text("\n".join(bad))
    assert {line for line, _ in broken_rules(tmp_path / "bad.py")} == {1, 2, 3, 4, 5}
    (tmp_path / "good.py").write_text("model.eval()\nsubprocess.run(['ls'])\ntorch.load('x', weights_only=True)\n")
    assert broken_rules(tmp_path / "good.py") == []


def test_environment_variables_are_read_in_one_module():
    read = re.compile(r"""environ.{0,8}["']VQFAST_""")
    readers = [p.relative_to(ROOT).as_posix() for p in python_files("vqfast", "kernels") if read.search(p.read_text())]
    assert readers == ["vqfast/_backends.py"]


def test_the_readme_lists_every_environment_variable():
    def named(*paths: Path) -> set[str]:
        return {name for path in paths for name in re.findall(r"""["'](VQFAST_[A-Z_]+)["']""", path.read_text())}

    used = named(ROOT / "vqfast/_backends.py", ROOT / "setup.py", ROOT / "tests/conftest.py")
    listed = set(re.findall(r"VQFAST_[A-Z_]+", (ROOT / "README.md").read_text()))
    if not listed:
        pytest.skip("README.md has no table of environment variables yet")
    assert listed == used


def test_files_stay_under_600_lines():
    files = [*python_files("vqfast", "kernels", "tests", "bench"), *csrc("*.cpp", "*.h", "*.cu", "*.cuh")]
    assert [path.name for path in files if len(path.read_text().splitlines()) > 600] == []


def test_no_folder_holds_a_cpp_and_a_cu_of_one_name():
    assert not {p.with_suffix("") for p in csrc("*.cpp")} & {p.with_suffix("") for p in csrc("*.cu")}


def test_tests_and_benchmarks_are_not_packages():
    assert [p for folder in ("tests", "bench") for p in (ROOT / folder).rglob("__init__.py")] == []

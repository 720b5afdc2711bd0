"""Arrows between files point one way; read from the source, so that no import is missed."""

import ast
import pathlib
import subprocess
import sys

import pytest

import fedjax_dp

PACKAGE = "fedjax_dp"
SOURCE = pathlib.Path(fedjax_dp.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))

LAYERS = (
    ("processor",),
    ("data",),
    ("typing", "varying", "hoisting"),
    ("models",),
    ("segmentation",),
    ("privacy",),
    ("federated",),
    ("attacks",),
    ("reporting",),
)
"""A file imports from its own layer and those before it; a module that is named nowhere here
(configuration, assembly, checkpoints, the host loop) is above all of them."""

HOST_ONLY = (
    "secrets",
    "ledger",
    "events",
    "pld",
    "renyi",
    "discrete_gaussian",
    "accounting",
    "calibration",
    "settings",
    "guarantees",
    "overflow",
    "unit_guarantees",
    "update_guarantees",
    "placements",
    "mechanism",
    "budgets",
    "fixed_point",
    "secret_sharing",
    "secure_aggregation",
    "disclosure",
    "statement",
    "statement_check",
    "journal",
    "run_records",
    "register",
    "composition",
    "across_runs",
    "audit",
    "reconstruction",
)
"""Files of `privacy/` that run before, or without, a device."""

PRIVACY_MAY_IMPORT = {
    "clipping": {"blocks"},
    "quantisation": {"blocks", "clipping", "discrete_gaussian"},  # clipped, then quantised
    "pld": {"events"},
    "renyi": {"events"},
    "accounting": {"events", "pld", "renyi"},
    "calibration": {"accounting", "events"},
    "guarantees": {"accounting"},
    "overflow": {"settings"},
    "unit_guarantees": {"discrete_gaussian", "events", "guarantees", "overflow", "settings"},
    "update_guarantees": {"events", "guarantees", "overflow", "settings"},
    "placements": {"guarantees", "settings", "unit_guarantees", "update_guarantees"},
    "mechanism": {"calibration", "guarantees", "placements", "settings", "unit_guarantees"},
    "budgets": {"mechanism", "overflow", "settings"},
    "secure_aggregation": {"fixed_point", "secret_sharing"},
    "disclosure": {"settings"},
    "statement": {"disclosure", "mechanism", "accounting", "events"},
    "statement_check": {"mechanism", "statement"},
    "ledger": {"journal"},
    "register": {"journal", "run_records"},
    "composition": {"accounting", "events"},
    "across_runs": {"composition", "mechanism", "run_records"},
    "reconstruction": {"accounting", "events"},
}
"""Which files of `privacy/` may know which others; all the rest stand alone."""


def module_name(path):
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path_or_text, module=PACKAGE):
    """Every module imported anywhere in a file, in functions too; relative ones made absolute."""
    is_path = isinstance(path_or_text, pathlib.Path)
    found = set()
    for node in ast.walk(ast.parse(path_or_text.read_text() if is_path else path_or_text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(module.split(".")[: -node.level]) if node.level else ""
            name = ".".join(part for part in (base, node.module) if part)
            found |= {name} | {f"{name}.{alias.name}" for alias in node.names}
    return found


def layer(module):
    """The number of a module of ours; those that no layer names come last."""
    parts = module.split(".")
    if len(parts) == 1:
        return 0  # the package itself holds the version alone
    for number, names in enumerate(LAYERS):
        if parts[1] in names:
            return number
    return len(LAYERS)


def upward(module, imported):
    """Imports of our own that point to a later layer."""
    ours = {name for name in imported if name.split(".")[0] == PACKAGE}
    return {name for name in ours if layer(name) > layer(module) and is_module(name)}


def is_module(name):
    path = SOURCE.parent.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def of(folder):
    return [path for path in FILES if path.relative_to(SOURCE).parts[0] == folder]


def test_every_layer_is_there():
    for names in LAYERS:
        for name in names:
            assert (SOURCE / name).is_dir() or (SOURCE / f"{name}.py").is_file(), name
    assert len(FILES) > 30


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_arrows_point_one_way(path):
    assert upward(module_name(path), imports(path, module_name(path))) == set()


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_the_library_knows_neither_experiments_nor_benchmarks_nor_tests(path):
    top = {name.split(".")[0] for name in imports(path)}
    assert not top & {"experiments", "benchmarks", "tests"}


def test_data_imports_no_jax():
    for path in of("data"):
        top = {name.split(".")[0] for name in imports(path)}
        assert not top & {"jax", "jaxlib", "flax", "optax", "jaxtyping"}, path


def test_host_side_privacy_imports_no_jax():
    for name in HOST_ONLY:
        top = {m.split(".")[0] for m in imports(SOURCE / "privacy" / f"{name}.py")}
        assert not top & {"jax", "jaxlib", "flax", "optax", "jaxtyping"}, name


def test_not_even_through_others():
    """Importing all of `data` and the host side of `privacy` loads no JAX."""
    modules = [module_name(path) for path in of("data")]
    modules += [f"{PACKAGE}.privacy.{name}" for name in HOST_ONLY]
    program = f"import sys, {', '.join(modules)}; sys.exit('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


def test_privacy_files_know_each_other_only_through_the_mechanism():
    for path in of("privacy"):
        prefix = f"{PACKAGE}.privacy."
        known = {
            n.removeprefix(prefix).split(".")[0] for n in imports(path) if n.startswith(prefix)
        }
        assert known <= PRIVACY_MAY_IMPORT.get(path.stem, set()), path


def test_the_algorithms_are_the_last_of_the_federated_files():
    for path in of("federated"):
        below = path.parent.name != "algorithms"
        known = [name for name in imports(path) if f"{PACKAGE}.federated.algorithms" in name]
        assert not (below and known), path


def test_the_test_has_power():
    assert upward("fedjax_dp.data.tiles", imports("from fedjax_dp.privacy import noise"))
    assert upward("fedjax_dp.models.unet", imports("def f():\n  import fedjax_dp.federated.client"))
    assert upward("fedjax_dp.privacy.noise", imports("from fedjax_dp import training"))
    assert "fedjax_dp.models.unet" in imports("from .models import unet", "fedjax_dp.training")
    assert not upward("fedjax_dp.training", imports("from fedjax_dp.data.tiles import TileTable"))
    assert "jax" in imports("def f():\n  import jax")

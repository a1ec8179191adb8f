"""Where data files come from, and that nothing damaged, partial or unknown ever passes for one."""

from __future__ import annotations

import gzip
import os
import shutil
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path

import data_helpers
import pytest
from data_helpers import digest, serving, write_deb, write_manifest, write_sdist, write_tool, write_wheel

from compressible import data

CONTENT = bytes(range(256)) * 4000  # 1 MB
NAME = "set/file.bin"


@pytest.fixture(autouse=True)
def own_places(tmp_path, monkeypatch):
    for name in ("COMPRESSIBLE_DATA", "COMPRESSIBLE_OFFLINE", "PIP_NO_BINARY", "PIP_ONLY_BINARY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COMPRESSIBLE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def server():
    with serving() as running:
        running.files["file.bin"] = CONTENT
        yield running


def manifest_of(tmp_path, *sources: str, content: bytes = CONTENT):
    return write_manifest(tmp_path / "manifest.toml", {NAME: (content, list(sources))})


def cached_files(tmp_path) -> list[str]:
    """Whatever lies in the cache beside lock files."""
    files = (path for path in (tmp_path / "cache").rglob("*") if path.is_file())
    return sorted(path.name for path in files if path.suffix != ".lock")


def test_download_is_verified_cached_and_not_repeated(tmp_path, server):
    manifest_of(tmp_path, f"{server.url}/file.bin")
    path = data.fetch(NAME)
    assert path == data.cached_path(NAME) and path.read_bytes() == CONTENT
    assert data.fetch(NAME) == path
    assert server.requests == ["file.bin"] and cached_files(tmp_path) == ["file.bin"]


def test_local_folder_comes_first(tmp_path, server, monkeypatch):
    manifest_of(tmp_path, f"{server.url}/file.bin")
    local = tmp_path / "local" / NAME
    local.parent.mkdir(parents=True)
    local.write_bytes(CONTENT)
    monkeypatch.setenv("COMPRESSIBLE_DATA", str(tmp_path / "local"))
    assert data.fetch(NAME) == local and server.requests == []


def test_wrong_local_file_is_an_error_with_both_digests(tmp_path, server, monkeypatch):
    manifest_of(tmp_path, f"{server.url}/file.bin")
    local = tmp_path / NAME
    local.parent.mkdir()
    local.write_bytes(b"something else")
    monkeypatch.setenv("COMPRESSIBLE_DATA", str(tmp_path))
    with pytest.raises(data.DataError) as caught:
        data.fetch(NAME)
    assert digest(b"something else") in str(caught.value) and digest(CONTENT) in str(caught.value)
    assert local.read_bytes() == b"something else" and server.requests == []


def test_sources_are_tried_in_order(tmp_path, server):
    missing, wrong = f"{server.url}/missing", f"{server.url}/wrong"
    server.files["wrong"] = b"not it"
    manifest_of(tmp_path, missing, wrong, f"{server.url}/file.bin")
    assert data.fetch(NAME).read_bytes() == CONTENT
    assert server.requests == ["missing", "wrong", "file.bin"]


def test_corrupt_cached_file_is_fetched_again(tmp_path, server):
    manifest_of(tmp_path, f"{server.url}/file.bin")
    path = data.fetch(NAME)
    path.write_bytes(CONTENT[:-1] + b"x")
    assert data.find(NAME) is None
    assert data.fetch(NAME).read_bytes() == CONTENT and len(server.requests) == 2


def test_corrupt_download_never_reaches_the_cache(tmp_path, server):
    manifest_of(tmp_path, f"{server.url}/file.bin", content=CONTENT + b"!")
    with pytest.raises(data.DataError, match=digest(CONTENT)):
        data.fetch(NAME)
    assert cached_files(tmp_path) == []


def test_interrupted_download_leaves_nothing_and_a_retry_succeeds(tmp_path, server):
    manifest_of(tmp_path, f"{server.url}/file.bin")
    server.cut = 1
    with pytest.raises(data.DataError, match=r"file\.bin"):
        data.fetch(NAME)
    assert cached_files(tmp_path) == [] and data.find(NAME) is None
    assert data.fetch(NAME).read_bytes() == CONTENT


FETCH = "import sys; from compressible import data; print(data.sha256(data.fetch(sys.argv[1])))"


def start_fetch() -> subprocess.Popen:
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", FETCH, NAME]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def test_killed_process_leaves_no_lock_and_nothing_that_passes_for_whole(tmp_path, server):
    manifest_of(tmp_path, f"{server.url}/file.bin")
    server.hang = threading.Event()
    process = start_fetch()
    assert server.half_sent.wait(60)
    process.kill()
    process.communicate(timeout=30)
    server.hang.set()
    server.hang = None
    assert data.find(NAME) is None
    assert data.fetch(NAME).read_bytes() == CONTENT


def test_concurrent_processes_download_once(tmp_path, server):
    manifest_of(tmp_path, f"{server.url}/file.bin")
    processes = [start_fetch() for _ in range(2)]
    printed = [process.communicate(timeout=120)[0].strip() for process in processes]
    assert printed == [digest(CONTENT)] * 2
    assert server.requests == ["file.bin"] and cached_files(tmp_path) == ["file.bin"]


def test_offline_error_says_file_size_reasons_and_what_to_do(tmp_path, server, monkeypatch):
    manifest_of(tmp_path, f"{server.url}/file.bin")
    monkeypatch.setenv("COMPRESSIBLE_OFFLINE", "1")
    with pytest.raises(data.DataError) as caught:
        data.fetch(NAME)
    text = str(caught.value)
    for part in (
        NAME,
        "1.02 MB",
        "COMPRESSIBLE_OFFLINE is 1",
        "COMPRESSIBLE_DATA",
        str(data.cached_path(NAME)),
    ):
        assert part in text
    assert server.requests == []
    monkeypatch.delenv("COMPRESSIBLE_OFFLINE")
    data.fetch(NAME)
    monkeypatch.setenv("COMPRESSIBLE_OFFLINE", "1")
    assert data.fetch(NAME).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("said", "forbids"), [("true", True), ("YES", True), ("on", True), ("0", False), ("false", False), ("", False)]
)
def test_the_network_is_forbidden_in_other_words_too(said, forbids, tmp_path, server, monkeypatch):
    manifest_of(tmp_path, f"{server.url}/file.bin")
    monkeypatch.setenv("COMPRESSIBLE_OFFLINE", said)
    if forbids:
        with pytest.raises(data.DataError, match=f"COMPRESSIBLE_OFFLINE is {said}"):
            data.fetch(NAME)
    else:
        assert data.fetch(NAME).read_bytes() == CONTENT
    assert bool(server.requests) is not forbids


def test_unreachable_host_fails_soon_and_names_every_source(tmp_path):
    sources = ["http://127.0.0.1:9/file.bin", "http://host.invalid/file.bin"]
    began = time.monotonic()
    manifest_of(tmp_path, *sources)
    with pytest.raises(data.DataError) as caught:
        data.fetch(NAME)
    assert time.monotonic() - began < 30
    assert all(source in str(caught.value) for source in sources)
    assert caught.value.__cause__ is None and caught.value.__context__ is None  # one error, not a chain


def test_hub_source_without_the_hub_library_is_a_clear_reason(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    manifest_of(tmp_path, "hf:owner/name@main#file.bin")
    with pytest.raises(data.DataError, match="huggingface_hub is not installed"):
        data.fetch(NAME)


@pytest.mark.parametrize("place", ["local", "cache/data"])
def test_a_file_that_cannot_be_read_is_a_reason_and_no_crash(tmp_path, server, monkeypatch, place):
    monkeypatch.setenv("COMPRESSIBLE_DATA", str(tmp_path / "local"))
    manifest_of(tmp_path)
    there = tmp_path / place / NAME
    there.parent.mkdir(parents=True)
    there.write_bytes(CONTENT)

    def unreadable(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("compressible.data.manifest.sha256", unreadable)
    with pytest.raises(data.DataError) as caught:
        data.fetch(NAME)
    assert f"cannot read {there}: PermissionError" in str(caught.value) and "what to do" in str(caught.value)
    with pytest.raises(data.DataError, match="what to do"):
        data.fetch_all([NAME])


def test_unwritable_cache_is_a_reason_not_a_crash(tmp_path, server, monkeypatch):
    (tmp_path / "taken").write_text("a file where the cache should be")
    monkeypatch.setenv("COMPRESSIBLE_CACHE", str(tmp_path / "taken"))
    manifest_of(tmp_path, f"{server.url}/file.bin")
    with pytest.raises(data.DataError, match=r"cache: .*taken"):
        data.fetch(NAME)


@pytest.fixture
def local_pip(tmp_path, monkeypatch):
    """pip sees one local folder and nothing else."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "packages"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return tmp_path / "packages"


def test_one_member_is_taken_from_a_wheel(tmp_path, local_pip):
    write_wheel(local_pip, "tinyset", {"tinyset/data/file.bin": CONTENT, "tinyset/__init__.py": b"raise SystemExit"})
    manifest_of(tmp_path, "pip:tinyset==1.0#tinyset/data/file.bin")
    assert data.fetch(NAME).read_bytes() == CONTENT
    assert cached_files(tmp_path) == ["file.bin"]


def test_member_that_only_the_source_archive_has(tmp_path, local_pip):
    write_wheel(local_pip, "tinyset", {"tinyset/__init__.py": b""})
    archive = write_sdist(local_pip, "tinyset", {"extra/file.bin": CONTENT})
    manifest_of(tmp_path, f"pip:tinyset==1.0@sha256:{data.sha256(archive)}#extra/file.bin")
    assert data.fetch(NAME).read_bytes() == CONTENT


def test_no_code_of_an_archive_runs_before_its_digest_is_known(tmp_path, local_pip, monkeypatch):
    ran = tmp_path / "ran"
    backend = data_helpers.BACKEND.replace(
        "    os.makedirs(info)", f"    open({str(ran)!r}, 'w')\n    os.makedirs(info)"
    )
    monkeypatch.setattr(data_helpers, "BACKEND", backend)
    archive = write_sdist(local_pip, "tinyset", {"file.bin": CONTENT})
    for source in ("pip:tinyset==1.0#file.bin", f"pip:tinyset==1.0@sha256:{'0' * 64}#file.bin"):
        manifest_of(tmp_path, source)
        with pytest.raises(data.DataError, match=r"tinyset==1\.0 failed"):
            data.fetch(NAME)
        assert not ran.exists()
    manifest_of(tmp_path, f"pip:tinyset==1.0@sha256:{data.sha256(archive)}#file.bin")
    assert data.fetch(NAME).read_bytes() == CONTENT
    assert ran.exists()  # so the backend would have been seen


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("pip:tinyset==1.0#no/such", "has no member 'no/such'; a source archive is read where the manifest names"),
        ("pip:absent==2.0#file.bin", "absent==2.0 failed"),
    ],
)
def test_pip_failures_are_reasons(tmp_path, local_pip, source, reason):
    write_wheel(local_pip, "tinyset", {"file.bin": CONTENT})
    manifest_of(tmp_path, source)
    with pytest.raises(data.DataError, match=reason):
        data.fetch(NAME)


def test_wrong_member_is_not_accepted(tmp_path, local_pip):
    write_wheel(local_pip, "tinyset", {"file.bin": b"another version"})
    manifest_of(tmp_path, "pip:tinyset==1.0#file.bin")
    with pytest.raises(data.DataError, match=digest(b"another version")):
        data.fetch(NAME)
    assert cached_files(tmp_path) == []


@pytest.fixture
def local_apt(tmp_path, monkeypatch):
    """A Debian package of two gzipped files, a stand-in for apt-get that copies it, and a list of the calls."""
    needed = [tool for tool in ("dpkg-deb", "sh") if shutil.which(tool) is None]
    if needed:
        pytest.skip(f"needs {' and '.join(needed)}")
    write_deb(tmp_path / "tinyset_1.0_all.deb", {f"usr/share/{name}.gz": gzip.compress(PARTS[name]) for name in PARTS})
    write_tool(
        tmp_path / "bin" / "apt-get",
        f'echo "$@" >> {tmp_path}/calls\n'
        'for package; do :; done\n'  # the last argument
        'if [ "$package" = tinyset ]; then cp ' + f'{tmp_path}/tinyset_1.0_all.deb .; exit 0; fi\n'
        'echo "E: Unable to locate package $package" >&2; exit 100\n',
    )  # fmt: skip
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    return tmp_path / "calls"


PARTS = {"one": CONTENT, "two": b"another file"}


def test_a_debian_package_serves_its_members_unpacked_and_is_downloaded_once(tmp_path, local_apt):
    files = {f"set/{name}": (PARTS[name], [f"gz+deb:tinyset#usr/share/{name}.gz"]) for name in PARTS}
    write_manifest(tmp_path / "manifest.toml", files)
    assert [path.read_bytes() for path in data.fetch_all(files)] == list(PARTS.values())
    assert len(local_apt.read_text().splitlines()) == 1 and cached_files(tmp_path) == ["one", "two"]
    assert not list(Path.cwd().glob("*.deb"))


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("deb:tinyset#no/such", r"tinyset_1\.0_all\.deb has no member 'no/such'"),
        ("deb:absent#file.bin", "apt-get download absent failed: E: Unable to locate package absent"),
        ("gz+deb:tinyset#usr/share/one.gz", digest(CONTENT + b"!")),
    ],
)
def test_failures_of_a_debian_package_are_reasons(tmp_path, local_apt, source, reason):
    manifest_of(tmp_path, source, content=CONTENT + b"!")
    with pytest.raises(data.DataError, match=reason):
        data.fetch(NAME)
    assert cached_files(tmp_path) == []


def test_without_debians_tools_a_package_is_a_reason(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    manifest_of(tmp_path, "deb:tinyset#file.bin")
    with pytest.raises(data.DataError, match="apt-get and dpkg-deb not found: expected Debian"):
        data.fetch(NAME)


def test_a_damaged_debian_package_is_a_reason(tmp_path, local_apt):
    (tmp_path / "tinyset_1.0_all.deb").write_bytes(b"no archive")
    manifest_of(tmp_path, "deb:tinyset#usr/share/one.gz")
    with pytest.raises(data.DataError, match=r"dpkg-deb --fsys-tarfile tinyset_1\.0_all\.deb failed"):
        data.fetch(NAME)


def test_gzipped_copies_with_other_headers_are_one_file(tmp_path, server):
    first, second = (gzip.compress(CONTENT, mtime=time) for time in (1, 2))
    assert first != second
    for content in (first, second):
        server.files["packed.gz"] = content
        manifest_of(tmp_path, f"gz+{server.url}/packed.gz")
        assert data.fetch(NAME).read_bytes() == CONTENT
        assert cached_files(tmp_path) == ["file.bin"]
        data.cached_path(NAME).unlink()
    for damaged in (first[:-9], CONTENT, b""):
        server.files["packed.gz"] = damaged
        with pytest.raises(data.DataError, match=r"not a whole gzip file|sha256"):
            data.fetch(NAME)
        assert cached_files(tmp_path) == []


def test_unknown_name_gives_the_closest_one(tmp_path):
    with pytest.raises(data.DataError, match=r"closest is 'movielens-100k/ml-100k\.zip'"):
        data.fetch("movielens/ml-100k.zip")
    manifest_of(tmp_path)
    with pytest.raises(data.DataError, match=r"'set/flie\.bin'.*'set/file\.bin'"):
        data.fetch("set/flie.bin")


GOOD = {"sha256": "0" * 64, "size": 3, "licence": "l", "citation": "c", "description": "d", "sources": []}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("a/b", {"sha256": "abc"}, r"bad\.toml: files\.a/b\.sha256: got 'abc', expected to match .*64"),
        ("a/b", {"size": 0}, r"files\.a/b\.size: got 0, expected greater than 0"),
        ("a/b", {"size": "3"}, r"files\.a/b\.size: got '3', .*valid integer"),
        ("a/b", {"size": None}, r"missing 'files\.a/b\.size'"),
        ("a/b", {"colour": "red"}, r"unknown key 'files\.a/b\.colour'"),
        ("../b", {}, r"name: got '\.\./b', expected to match"),
        ("/etc/b", {}, "name: got '/etc/b'"),
        ("a\\b", {}, "expected to match"),
        ("a/b", {"sources": ["ftp://host/b"]}, "ftp://host/b"),
        ("a/b", {"sources": ["pip:package#member"]}, r"sources\.0: got 'pip:package#member', expected"),
        ("a/b", {"sources": ["deb:package"]}, r"sources\.0: got 'deb:package', .*deb:"),
        ("a/b", {"sources": ["deb:-o#member"]}, r"sources\.0: got 'deb:-o#member'"),
        ("a/b", {"sources": ["gz+ftp://host/b"]}, r"got 'gz\+ftp://host/b'"),
    ],
)
def test_bad_manifest_is_refused(tmp_path, monkeypatch, name, change, message):
    table = {key: value for key, value in (GOOD | change).items() if value is not None}
    lines = [f"{key} = {value!r}" for key, value in table.items()]
    path = tmp_path / "bad.toml"
    path.write_text("\n".join([f"[files.'{name}']", *lines]))
    monkeypatch.setenv("COMPRESSIBLE_MANIFEST", str(path))
    with pytest.raises(data.DataError, match=message):
        data.load_manifest()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("files = 3", "files: got 3, .* valid dictionary"),
        ("[files]\n'a/b' = 3", r"files\.a/b: got 3, .* valid dictionary"),
        ("[file.'a/b']", "unknown key 'file'"),
        ("[sets.a]\nrows = 1", r"missing 'sets\.a\.licence'; .*missing 'sets\.a\.items'"),
        ("[files", "cannot read the data manifest .*bad"),
    ],
)
def test_what_is_no_manifest_is_refused(tmp_path, monkeypatch, content, message):
    (tmp_path / "bad.toml").write_text(content)
    monkeypatch.setenv("COMPRESSIBLE_MANIFEST", str(tmp_path / "bad.toml"))
    with pytest.raises(data.DataError, match=message):
        data.load_sets()


def test_the_projects_manifest_is_valid_and_says_on_what_terms():
    entries = data.load_manifest()
    assert len(entries) >= 13 and all(entry.licence and entry.citation for entry in entries.values())
    assert "movielens-100k" in data.load_sets()
    fetched = [name for name, entry in entries.items() if entry.sources]
    assert fetched[:2] == ["movielens-100k/ml-100k.zip", "movielens-100k/ml-100k.inter"]
    assert {name.partition("/")[0] for name in fetched[2:]} == {
        "movielens-latest-small", "movielens-1m", "movielens-25m", "minilm", "mpnet", "gemma3-270m", "vader", "wordnet",
        "mnist-5k", "fashion-mnist", "cifar10",
    }  # fmt: skip
    assert entries["vader/hutto_ICWSM_2014.tar.gz"].citation.endswith("2014")


CHECKOUT = Path(__file__).resolve().parents[1]
INSTALLED = """
import compressible as cd
print(cd.__file__, len(cd.data.load_manifest()), cd.data.load_sets()["movielens-100k"].rows)
try:
    cd.load_tokenizer("minilm")
except cd.data.DataError as error:
    print(str(error).splitlines()[0])
"""


def install(folder: Path) -> None:
    """Copy what a wheel would hold: the packages' modules, and the other files that pyproject.toml declares."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["tool"]["setuptools"]
    source = CHECKOUT / "lib"
    packages = [init.parent for init in source.rglob("__init__.py")]
    files = [file for package in packages for file in package.glob("*.py")]
    for package, patterns in project["package-data"].items():
        files += [file for one in patterns for file in (source / package.replace(".", "/")).glob(one)]
    for file in files:
        target = folder / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)


def test_an_installed_package_knows_its_data_outside_of_a_checkout(tmp_path):
    install(tmp_path / "site")
    own = {"PYTHONPATH": str(tmp_path / "site"), "COMPRESSIBLE_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    # -P, and a folder of its own, keep the checkout out of sight.
    command = [sys.executable, "-P", "-c", INSTALLED]
    done = subprocess.run(command, env=os.environ | own, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    place, entries, rows = first.split()
    assert Path(place).is_relative_to(tmp_path) and (int(entries), rows) == (len(data.load_manifest()), "100000")
    assert second.startswith("cannot get minilm/config.json (0.00 MB), tried")


@pytest.mark.parametrize("get", [data.fetch, lambda name: data.fetch_all([name])], ids=["fetch", "fetch_all"])
def test_a_file_that_the_installed_package_reads_wrong_is_refused(get, server, tmp_path):
    file = manifest_of(tmp_path, f"{server.url}/file.bin")
    told = file.read_text()
    for reader in ("torch>=1", "a-package-that-nobody-has>=3"):  # met; what is not installed reads nothing at all
        file.write_text(f'{told}reader = "{reader}"\n')
        get(NAME)
    file.write_text(f'{told}reader = "torch>=99"\n')
    with pytest.raises(
        data.DataError, match=r"set/file\.bin needs torch>=99, since other versions.*torch 2\..* is inst"
    ):
        get(NAME)
    file.write_text(f'{told}reader = "torch more than 3"\n')
    with pytest.raises(data.DataError, match=r"'torch more than 3', expected a requirement"):
        get(NAME)

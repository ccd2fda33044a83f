"""The machine code of CUDA kernels as digests, so that a change that keeps it keeps its record.

It is the code of sm_90 without the places of arguments in constant memory. These are numbered in
the order in which they are met, so that a table among the arguments may have another size. That no
two are mixed up is for the tests of the host execution to show. These run what launches kernels
too, but for the lines that nvcc alone sees, such as the launch itself: those have a digest more.

`PYTHONPATH=.:bench python tests/machine_code.py COMMIT RECORD` adds the digests of a commit to a
record of bench/results/ that was made of it, and which ops have the same machine code here.
"""

import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import sass
from gpu.results import kernel_files, sources
from nvcc import kept, release
from places import ROOT


def digests(text):
    """digest -> the name of a kernel and what it is a template of, of what cuobjdump prints."""
    return {digest(body): sass.short(name) for name, body in sass.bodies(text)}


def digest(body):
    places = {}

    def place(match):
        return f"{match[1]}argument {places.setdefault(match[2], len(places))}]"

    lines = re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(.*?);", body)
    code = re.sub(r"(c\[0x0\]\[(?:R\d+\+)?)(-?0x[0-9a-f]+)\]", place, "\n".join(lines))
    return hashlib.sha256(code.encode()).hexdigest()[:20]


def of_file(file):
    """digests(...) of a .cu file here."""
    return digests(kept(file, "sass", sass.sass_of))


def only_nvcc(root=ROOT):
    """A digest of the lines that the host execution has others for."""
    text = (root / "csrc" / "cuda" / "common.cuh").read_text()
    lines = re.findall(r"^#ifdef __CUDACC__\n(.*?)^#(?:else|endif)", text, re.DOTALL | re.MULTILINE)
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:20]


def of_commit(commit, record):
    """What a record has of its commit: op -> digests(...), and only_nvcc(...)."""
    archive = subprocess.run(["git", "archive", commit, "csrc"], capture_output=True, check=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar,
    ):
        tar.extractall(folder, filter="data")
        files = kernel_files(Path(folder))
        if sources(Path(folder)) != record["sources"]:
            raise SystemExit(f"the record is not of {commit}")
        made = {file: digests(sass.sass_of(file, Path(folder))) for file in set(files.values())}
        kernels = {op: made[file] for op, file in files.items()}
        return {"kernels": kernels, "only_nvcc": only_nvcc(Path(folder))}


def changed(op, record):
    """What is not as it ran: the kernels here that did not, or what nvcc alone sees."""
    made = record["machine_code"]
    new = {
        name
        for code, name in of_file(kernel_files()[op]).items()
        if code not in made["kernels"].get(op, {})
    }
    return new | ({"what nvcc alone sees"} if only_nvcc() != made["only_nvcc"] else set())


def main(commit, path):
    record = json.loads(Path(path).read_text())
    made = record["machine_code"] = {"nvcc": release(), **of_commit(commit, record)}
    found = {op: changed(op, record) for op in made["kernels"] if op in sources()}
    made["same_in"] = {op: sources()[op] for op, new in found.items() if not new}
    Path(path).write_text(json.dumps(record, indent=1) + "\n")
    for op, new in found.items():
        print(f"{op}: {', '.join(sorted(new)) or 'the same'}")


if __name__ == "__main__":
    main(*sys.argv[1:])

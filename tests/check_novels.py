"""Prepare a corpus whose files are known by their hashes, under each setting, with 1, 2 and 5 processes.

    python tests/check_novels.py novels.parquet expected.json

expected.json lists, for each setting, `flags` and, for train and val, the sha256, tokens and rows.
"""
import hashlib
import json
import pathlib
import subprocess
import sys
import tempfile

SCRIPT = pathlib.Path(__file__).resolve().parent.parent / "data" / "bookcorpus" / "prepare.py"
source, expected = sys.argv[1:]
for setting in json.loads(pathlib.Path(expected).read_text()):
    for num_proc in 1, 2, 5:
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([sys.executable, SCRIPT, f"--source={source}", f"--out_dir={folder}",
                            f"--num_proc={num_proc}", *setting["flags"]], check=True, capture_output=True)
            for name in "train", "val":
                body = pathlib.Path(folder, f"{name}.bin").read_bytes()
                found = {"sha256": hashlib.sha256(body).hexdigest(), "tokens": len(body) // 2}
                assert found == {key: setting[name][key] for key in found}, (setting, num_proc, name, found)
        print(f"{' '.join(setting['flags']) or 'defaults'}, {num_proc} processes: as expected", flush=True)

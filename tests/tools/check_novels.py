"""Run prepare.py on a corpus and compare train.bin and val.bin with known SHA-256 values.

    python tests/tools/check_novels.py novels.parquet expected.json

expected.json is a list of settings: `flags`, and for `train` and `val` the sha256 and the tokens.
The first setting runs with 1 process, the second with 2, the third with 5, and so on.
Stops at the first difference.
"""
import argparse
import hashlib
import json
import pathlib
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from common import PREPARE, bins  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="the corpus, for --source of prepare.py")
    parser.add_argument("expected", type=pathlib.Path, help="path of expected.json")
    parser.add_argument("--all", action="store_true", help="run each setting with 1, 2 and 5")
    args = parser.parse_args()
    counts = [1, 2, 5]
    for i, setting in enumerate(json.loads(args.expected.read_text())):
        for num_proc in counts if args.all else [counts[i % 3]]:
            flags = [f"--num_proc={num_proc}", *setting["flags"]]
            with tempfile.TemporaryDirectory() as folder:
                subprocess.run([sys.executable, PREPARE, f"--source={args.source}",
                                f"--out_dir={folder}", *flags], check=True, capture_output=True)
                for name, content in zip(("train", "val"), bins(pathlib.Path(folder))):
                    found = {"sha256": hashlib.sha256(content).hexdigest(),
                             "tokens": len(content) // 2}
                    expected = {key: setting[name][key] for key in found}
                    if found != expected:
                        sys.exit(f"{' '.join(flags)}: {name}.bin has {found}, not {expected}")
            print(f"{' '.join(flags)}: as expected", flush=True)


if __name__ == "__main__":
    main()

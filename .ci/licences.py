"""Write docs/licences.md: the licence of each package of requirements.txt, from its own metadata.

    .venv/bin/python .ci/licences.py

For a Python in which they are installed, as `bash run_train.sh` does.
"""

import re
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SPDX = {  # what packages write where they give no SPDX expression, in the order in which it is looked for
    "Apache": "Apache-2.0",
    "HPND": "HPND",
    "BSD-3-Clause": "BSD-3-Clause",
    "3-Clause": "BSD-3-Clause",
    "MPL": "MPL-2.0",
    "PSF": "PSF-2.0",
    "Python Software Foundation": "PSF-2.0",
    "Matplotlib": "PSF-2.0",
    "MIT": "MIT",
    "BSD": "BSD-3-Clause",
}


def licence_of(package: metadata.PackageMetadata) -> str:
    """As an SPDX expression where one can be told."""
    if "License-Expression" in package:
        return package["License-Expression"]
    told = (package["License"] or "").split("\n")[0]
    if re.fullmatch(r"[A-Za-z]+-[0-9.]+(-[A-Za-z]+)?( (AND|OR) [A-Za-z0-9.-]+)*", told):
        return told
    classifiers = [line for line in package.get_all("Classifier") or () if line.startswith("License ::")]
    found = [next((SPDX[word] for word in SPDX if word in line), None) for line in (*classifiers, told)]
    return " OR ".join(sorted({name for name in found if name})) or told or "not told"


def main() -> None:
    """Write the page."""
    names = re.findall(r"^([A-Za-z0-9_.-]+)==", (ROOT / "requirements.txt").read_text(), flags=re.MULTILINE)
    rows = []
    for name in sorted(set(names), key=str.lower):
        try:
            package = metadata.metadata(name)
        except metadata.PackageNotFoundError:
            continue  # for another Python
        rows.append(f"| {name} | {package['Version']} | {licence_of(package)} |")
    page = "# Licences\n\nskipvit itself is under Apache-2.0. What `requirements.txt` installs, by each package's own\n"
    page += "metadata (made by `.ci/licences.py`):\n\n| package | version | licence (SPDX) |\n| --- | --- | --- |\n"
    (ROOT / "docs" / "licences.md").write_text(page + "\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

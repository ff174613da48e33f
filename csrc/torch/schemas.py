"""Writes the operators' schemas as C++ string literals: `schemas.py _schema.py OUTPUT`."""

import json
import runpy
import sys

source, output = sys.argv[1:]
definitions = runpy.run_path(source)["DEFINITIONS"]
with open(output, "w") as file:
    file.writelines(f"    {json.dumps(definition)},\n" for definition in definitions)

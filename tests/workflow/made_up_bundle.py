# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Stands for a bundle's command: counts steps, saves after each, goes on after a kill, and writes its result last.

    python made_up_bundle.py RESULT CONTENT STEPS

Every step is appended to ``RESULT``'s folder, ``steps``; the last saved one is in ``last``. Free of slow imports.
"""

import os
import sys
import time

RESULT, CONTENT, STEPS = sys.argv[1], sys.argv[2], int(sys.argv[3])
folder = os.path.dirname(RESULT)
os.makedirs(folder, exist_ok=True)
last = os.path.join(folder, "last")
begin = int(open(last).read()) if os.path.exists(last) else 0
for step in range(begin + 1, STEPS + 1):
    time.sleep(0.02)
    with open(os.path.join(folder, "steps"), "a") as steps:
        steps.write(f"{step} {time.time()} {os.environ.get('SLURMD_NODENAME', '')}\n")
    with open(last + ".new", "w") as saved:
        saved.write(str(step))
    os.replace(last + ".new", last)
    print(f"step {step}/{STEPS}  loss {1 / step:.4f}  left 0:00", flush=True)
text = open(CONTENT).read() if os.path.exists(CONTENT) else CONTENT
with open(RESULT + ".new", "w") as result:
    result.write(text)
os.replace(RESULT + ".new", RESULT)

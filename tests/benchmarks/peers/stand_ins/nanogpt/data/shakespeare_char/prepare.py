import os

import numpy as np

here = os.path.dirname(__file__)
text = open(os.path.join(here, "input.txt")).read()
ids = np.array(list(map(sorted(set(text)).index, text)), dtype=np.uint16)
ids[int(len(ids) * 0.9) :].tofile(os.path.join(here, "val.bin"))

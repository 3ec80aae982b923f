import runpy
import sys

assert sys.argv[1] == "--nproc_per_node=2", sys.argv
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")

import json


def write_table(table, path, row_group_size):
    json.dump(table, open(path, "w"))

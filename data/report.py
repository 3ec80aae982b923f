"""report.html of a build."""


def html(manifest):
    return "<!doctype html>"

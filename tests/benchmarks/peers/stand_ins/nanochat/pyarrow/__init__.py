class Table:
    from_pydict = staticmethod(lambda columns: columns)

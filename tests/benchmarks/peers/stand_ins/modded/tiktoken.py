def get_encoding(name):
    pass

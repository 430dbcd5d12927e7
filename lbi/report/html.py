def write(store, name):
    return None

def experts(**k): raise NotImplementedError
def experts_space(max_rows, experts): return None

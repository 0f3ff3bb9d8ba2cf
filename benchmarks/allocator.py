"""PyTorch's caching allocator with expandable segments, by its rules alone."""

MIB = 2**20
GIB = 2**30


class OutOfMemory(Exception):
    pass


class ExpandableAllocator:
    """PyTorch's allocator with expandable segments: one range of addresses, of 20 MiB pages.

    A block goes where it fits best among free ranges with memory, else into the first free range,
    which gets pages as needed. When there are none left, free ranges give up their whole pages.
    Blocks of up to 1 MiB have a segment of their own, here without gaps, for which other free
    ranges give up their pages, too.
    """

    PAGE = 20 * MIB

    def __init__(self, capacity: float):
        self.capacity = capacity
        self.blocks = {}  # key: (start, size); the start of a small block is None
        self.small = 0  # bytes of small blocks
        self.pages = set()  # numbers of those that have memory
        self.free = {}  # start: size of free ranges
        self.starts = {}  # end: start of free ranges
        self.end = 0
        self.allocated = 0
        self.most_reserved = 0

    def reserved(self) -> int:
        small_segments = -(-self.small // (2 * MIB))
        return len(self.pages) * self.PAGE + small_segments * 2 * MIB

    def missing_pages(self, start: int, size: int) -> set[int]:
        """Return the numbers of a range's pages that have no memory."""
        last = -(-(start + size) // self.PAGE)
        return set(range(start // self.PAGE, last)) - self.pages

    def allocate(self, key, size: float) -> None:
        """Give memory to a block; raises OutOfMemory where the capacity is exceeded."""
        size = -(-max(int(size), 1) // 512) * 512
        self.allocated += size
        if size <= MIB:
            self.small += size
            self.blocks[key] = (None, size)
            if self.reserved() > self.capacity:
                self.give_up_free_pages()
        else:
            self.blocks[key] = (self.find(size), size)
        self.most_reserved = max(self.most_reserved, self.reserved())
        if self.reserved() > self.capacity:
            raise OutOfMemory(f"{size / GIB:.2f} GiB beside {self.allocated / GIB:.2f}")

    def find(self, size: int) -> int:
        """Return the address of a new block; its pages have memory."""
        fitting = sorted((room, start) for start, room in self.free.items() if room >= size)
        start = None
        for _, candidate in fitting:
            if not self.missing_pages(candidate, size):
                start = candidate
                break
        if start is None:
            start = self.make_room(size, fitting)
        room = self.remove_free(start)
        if room > size:
            self.add_free(start + size, room - size)
        return start

    def make_room(self, size: int, fitting: list[tuple[int, int]]) -> int:
        """Return the start of a free range that has got memory for a block."""
        if fitting:
            start = min(start for _, start in fitting)
        else:
            # At the end, from where the last free range begins.
            start = self.starts.get(self.end, self.end)
            self.remove_free(start)
            self.end = max(self.end, start + size)
            self.add_free(start, self.end - start)
        missing = self.missing_pages(start, size)
        if self.reserved() + len(missing) * self.PAGE > self.capacity:
            self.give_up_free_pages()
        self.pages |= self.missing_pages(start, size)
        return start

    def give_up_free_pages(self) -> None:
        for first, room in self.free.items():
            whole = range(-(-first // self.PAGE), (first + room) // self.PAGE)
            self.pages -= set(whole)

    def remove_free(self, start: int) -> int:
        """Return the size of a free range that is no longer free, 0 where there was none."""
        size = self.free.pop(start, 0)
        if size:
            del self.starts[start + size]
        return size

    def add_free(self, start: int, size: int) -> None:
        self.free[start] = size
        self.starts[start + size] = start

    def release(self, key) -> None:
        start, size = self.blocks.pop(key)
        self.allocated -= size
        if start is None:
            self.small -= size
            return
        before = self.starts.get(start)
        if before is not None:
            size += self.remove_free(before)
            start = before
        self.add_free(start, size + self.remove_free(start + size))

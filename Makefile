# make           builds ./align           make run    the whole course, about a minute
# make test      builds and runs tests    make debug  ./align_debug for gdb: no optimisation, one thread
# make book      docs/book.html: align.c for reading
CC ?= cc
CFLAGS ?= -O3 -fopenmp

align: align.c
	$(CC) $(CFLAGS) align.c -o align -lm

test_align: test_align.c align.c
	$(CC) $(CFLAGS) test_align.c -o test_align -lm

run: align
	./align rlhf

test: test_align
	./test_align

debug: align.c
	$(CC) -O0 -g3 align.c -o align_debug -lm

book:
	python3 docs/make_book.py

clean:
	rm -f align align_debug test_align

.PHONY: run test debug book clean

# make           builds ./align           make run    the whole course, three minutes
# make test      builds and runs tests    make debug  ./align for gdb: no optimisation, one thread
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
	$(CC) -O0 -g3 -Wno-unknown-pragmas align.c -o align -lm

clean:
	rm -f align test_align

.PHONY: run test debug clean

# make           builds ./align           make run    the whole course, a minute or two
# make test      builds and runs tests    make debug  ./align_debug for gdb: no optimisation, one thread
# make book      docs/book.html: align.c for reading        make check-all  every instrument, about an hour
CC ?= cc

# Apple's clang refuses -fopenmp; Homebrew's libomp, if it is there, teaches it. Tried only where nobody chose CFLAGS.
ifeq ($(origin CFLAGS), undefined)
try = $(shell echo 'int main(void) { return omp_get_max_threads() < 1; }' | $(CC) $(1) -include omp.h -x c - -o .try_openmp 2> /dev/null && rm -f .try_openmp && echo found)
OPENMP := -fopenmp
ifneq ($(call try,$(OPENMP)), found)
BREW := $(shell brew --prefix libomp 2> /dev/null)
OPENMP := -Xpreprocessor -fopenmp -I$(BREW)/include -L$(BREW)/lib -lomp
ifneq ($(call try,$(OPENMP)), found)
OPENMP :=
$(info $(CC) has no OpenMP: align will run on one thread. For all of them: on macOS `brew install libomp`, elsewhere gcc or the package libomp-dev, and make again)
endif
endif
CFLAGS := -O3 $(OPENMP)
endif

align: align.c
	$(CC) $(CFLAGS) align.c -o align -lm

test_align: test_align.c align.c
	$(CC) $(CFLAGS) test_align.c -o test_align -lm

run: align
	./align rlhf

test: test_align
	./test_align

check-all:
	docs/check_all.sh

debug: align.c
	$(CC) -O0 -g3 align.c -o align_debug -lm

book:
	python3 docs/make_book.py

clean:
	rm -f align align_debug test_align

.PHONY: run test check-all debug book clean

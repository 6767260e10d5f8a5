# make           builds ./align           make run    the whole course, a few minutes
# make test      builds and runs tests    make debug  ./align_debug for gdb: no optimisation, one thread
# make book      docs/book.html: align.c for reading        make check-all  every instrument, about an hour
# make exercise  NAME=ppo_token_loss: a function to write yourself; without NAME the list (docs/exercises.md)
# make figures   docs/figures, from the numbers of `align explain`
# make bench     how fast this machine is; BENCH="--n_layer 2 --json": bench's flags (docs/tools/bench.c)
# make install   PREFIX=/usr/local DESTDIR=: the program, and beside it what it reads      make uninstall
# CFLAGS, CPPFLAGS, LDFLAGS and LDLIBS are yours, from the environment too; they come after the flags that align needs.
CC ?= cc
PREFIX ?= /usr/local

# Apple's clang refuses -fopenmp; Homebrew's libomp, if it is there, teaches it. `make OPENMP=` builds without.
ifeq ($(origin OPENMP), undefined)
try = $(shell echo 'int main(void) { return omp_get_max_threads() < 1; }' | $(CC) $(CPPFLAGS) $(CFLAGS) $(1) -include omp.h -x c - -x none -o .try_openmp $(LDFLAGS) $(LDLIBS) 2> /dev/null && echo found; rm -rf .try_openmp*)
OPENMP := -fopenmp
ifneq ($(call try,$(OPENMP)), found)
BREW := $(shell brew --prefix libomp 2> /dev/null)
OPENMP := -Xpreprocessor -fopenmp -I$(BREW)/include -L$(BREW)/lib -lomp
ifneq ($(call try,$(OPENMP)), found)
OPENMP :=
$(info $(CC) has no OpenMP: align will run on one thread. For all of them: on macOS `brew install libomp`, elsewhere gcc or the package libomp-dev, and make again)
endif
endif
endif
build = $(strip $(CC) -O3 $(OPENMP) $(CPPFLAGS) $(CFLAGS) $(1) $(LDFLAGS) $(LDLIBS) -lm)

align: align.c
	$(call build,align.c -o align)

test_align: test_align.c align.c
	$(call build,test_align.c -o test_align)

align_bench: docs/tools/bench.c align.c
	$(call build,docs/tools/bench.c -o align_bench)

run: align
	./align rlhf

bench: align_bench
	@./align_bench $(BENCH)

figures: align
	python3 docs/tools/make_figures.py

test: test_align
	./test_align

check-all:
	docs/tools/check_all.sh

debug: align.c
	$(CC) -O0 -g3 align.c -o align_debug -lm

book:
	python3 docs/tools/make_book.py

exercise:
	@python3 docs/tools/exercise.py $(NAME) $(if $(FORCE),--force)


# Where the program looks for them: ../share/align from its own folder.
share = $(DESTDIR)$(PREFIX)/share/align

install: align
	install -d "$(DESTDIR)$(PREFIX)/bin" "$(share)/docs"
	install -m 755 align "$(DESTDIR)$(PREFIX)/bin/align"
	install -m 644 tokenizer.bin LICENSE "$(share)"
	install -m 644 docs/glossary.md docs/report.html "$(share)/docs"
	install -m 644 docs/reviews.jsonl docs/reviews.LICENSE.txt "$(share)/docs"

uninstall:
	rm -f "$(DESTDIR)$(PREFIX)/bin/align" "$(share)/tokenizer.bin" "$(share)/LICENSE"
	rm -f "$(share)/docs/glossary.md" "$(share)/docs/report.html"
	rm -f "$(share)/docs/reviews.jsonl" "$(share)/docs/reviews.LICENSE.txt"
	-rmdir "$(share)/docs" "$(share)"

clean:
	rm -f align align_bench align_debug test_align

.PHONY: run bench test check-all debug book exercise figures install uninstall clean

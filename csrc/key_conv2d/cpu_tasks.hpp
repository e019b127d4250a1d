// How the work is cut into tasks, in which order these are done, and what is fetched ahead of them.
#pragma once

#include "cpu_filter.hpp"
#include "cpu_group.hpp"
#include "cpu_strip.hpp"

namespace mkf::MKF_ISA {

// Some of the vectors of channels.
struct Vectors {
    std::int64_t first, end;
};

// A strip, or all of a small image, of one vector of channels. It stands in a box of strips and vectors, which take
// turns on a strip before the next strip begins.
struct Task {
    std::int64_t image, end;  // the first and the end of its images
    int strip, group;
    int first_strip, end_of_strips, first_group, end_of_groups;

    int beside() const { return end_of_groups - first_group; }  // how many tasks further the same vector goes on
};

// What a kernel reads or writes of a channels-last tensor, for `Tasks::fetch`.
template <class T>
struct Stream {
    Tensor<T> tensor;
    int number;                // among those of the kernel
    int rows, before, after;   // a strip starts `rows` below the one above it and reaches `before` and `after` further
    int steps;                 // in which what a task wants is fetched
    std::ptrdiff_t row, step;  // bytes of a row, and of a row's share in a step

    Stream(const Tensor<T>& tensor, int number, int rows, int before, int after, int steps)
        : tensor(tensor), number(number), rows(rows), before(before), after(after), steps(steps),
          row(tensor.columns * tensor.channels * static_cast<std::ptrdiff_t>(sizeof(T))), step(row / steps) {}
};

// The cut does not depend on the number of threads, and so no result does; the order may.
//
// Channels-last, vectors of float32 that lie in the same two lines of memory go down an image together: what
// neighbouring strips share, and what is fetched ahead of them, then stays in the second cache, which it would not if
// many channels took turns on a strip. Few do, as otherwise a vector that is left over fetches lines of which it wants
// half, and so do all in bfloat16, where there is half as much. Where there are fewer images than threads, bands of
// strips are as many as threads: shares of an image that were whole vectors would cost more for some keys than for
// others.
template <class G>
struct Tasks {
    static constexpr int most_at_once = 48 / Vec::width;
    int rows, input_rows;  // of a strip, but for what it shares with others
    int groups, strips, together, band;
    bool all_at_once;  // all channels take turns on a strip
    bool small;        // an image is not worth a strip, nor to be fetched ahead
    int images;        // in a task; more would be more streams of memory than the processor foresees
    std::int64_t batch, count;

    Tasks(const KeyConv2d& p, std::int64_t out_rows, Vectors vectors, int threads)
        : rows(is_one_strip(p, out_rows) ? 2 * G::run : G::run),
          input_rows(rows / G::run * G::block),
          groups(static_cast<int>(vectors.end - vectors.first)),
          strips(static_cast<int>((out_rows + rows - 1) / rows)),
          together(!p.channels_last                                         ? 1
                   : p.dtype == DType::float32 && groups > most_at_once ? 32 / Vec::width
                                                                        : groups),
          all_at_once(together >= groups && vectors.first == 0 && vectors.end * Vec::width >= p.channels),
          small(is_small<G::k>(p)),
          images(small ? std::max(1, 8 / static_cast<int>(p.height * p.width)) : 1),
          batch(p.batch),
          count((p.batch + images - 1) / images * strips * groups) {
        const std::int64_t at_least = std::max<std::int64_t>(p.batch, 1), bands = (threads + at_least - 1) / at_least;
        band = static_cast<int>(std::max<std::int64_t>(1, (strips + bands - 1) / bands));
    }

    // Whether an image that is higher than a run is one strip all the same: of direct taps, pairs of rows are cheaper
    // than single ones (larger images then no longer fit into the first cache).
    static bool is_one_strip(const KeyConv2d& p, std::int64_t out_rows) {
        return G::down == 1 && G::up == 1 && out_rows <= 2 * G::run &&
               std::all_of(p.direct, p.direct + p.keys_count, [](bool direct) { return direct; });
    }

    int in_image() const { return strips * groups; }

    // Calls body(i, task) for the tasks that `take` gives (`parallel_pieces`), `cut` of them at a time.
    template <class Take, class Body>
    void each(Take take, int cut, const Body& body) const {
        for (std::int64_t first, last; take(first, last);) {
            Task task = (*this)[first * cut];
            for (std::int64_t i = first * cut; i < last * cut; ++i, advance(task)) body(i, task);
        }
    }

    // The task of the same vector that follows, or one like it in the next box.
    Task further(const Task& task) const {
        Task next = task;
        if (++next.strip < next.end_of_strips) return next;
        begin_next_box(next);
        next.group = std::min(next.first_group + task.group - task.first_group, next.end_of_groups - 1);
        return next;
    }

    // The place of a task among all, in an order that does not depend on the number of threads.
    std::int64_t place(const Task& task) const {
        return ((images == 1 ? task.image : task.image / images) * strips + task.strip) * groups + task.group;
    }

    // Adds what `next`, a task further on, wants and `task` has not had. Where all channels take turns, what they want
    // is fetched line after line, a share in each task, and of the vectors that share a line one fetches the first
    // tensor, one the second and so on.
    template <class T>
    void fetch(Ahead& ahead, const Stream<T>& stream, const Task& task, const Task& next,
               const Channels& channels) const {
        constexpr int line = 64, sharing = std::max(1, line / static_cast<int>(Vec::width * sizeof(T)));
        const Tensor<T>& t = stream.tensor;
        const bool goes_on = next.group == task.group && next.strip == task.strip + 1;
        const int first = std::max(0, next.strip * stream.rows + (goes_on ? stream.after : -stream.before));
        const int end = std::min((next.strip + 1) * stream.rows + stream.after, t.rows), wanted = end - first;
        if (t.data == nullptr || wanted <= 0) return;
        const T* const from = t.data + (next.image * t.rows + first) * t.columns * t.channels;
        if (!all_at_once) {
            ahead.add(reinterpret_cast<const char*>(from + channels.first), wanted, stream.row, stream.step);
        } else if (task.group % sharing == stream.number % sharing) {
            const int lines = static_cast<int>(static_cast<std::int64_t>(wanted) * t.columns / stream.steps);
            const std::ptrdiff_t share = static_cast<std::ptrdiff_t>(lines) * line * stream.steps;
            ahead.add(reinterpret_cast<const char*>(from) + task.group / sharing * share, lines, line, lines * line);
        }
    }

private:
    Task operator[](std::int64_t i) const {
        const int in_image = static_cast<int>(i % (strips * groups)), strip = in_image / (band * groups) * band;
        Task task{};
        begin_image(task, i / (strips * groups) * images);
        begin_strips(task, strip);
        const int in_band = in_image - strip * groups, strips_here = task.end_of_strips - strip;
        begin_groups(task, in_band / (strips_here * together) * together);
        const int in_box = in_band - task.first_group * strips_here;
        task.strip += in_box / task.beside();
        task.group += in_box % task.beside();
        return task;
    }

    // Goes on to the next task. A small layer has many, and divisions would take a tenth of its time.
    void advance(Task& task) const {
        if (++task.group < task.end_of_groups) return;
        task.group = task.first_group;
        if (++task.strip == task.end_of_strips) begin_next_box(task);
    }

    void begin_image(Task& task, std::int64_t image) const {
        task.image = image;
        task.end = std::min(image + images, batch);
    }
    void begin_strips(Task& task, int strip) const {
        task.strip = task.first_strip = strip;
        task.end_of_strips = std::min(strip + band, strips);
    }
    void begin_groups(Task& task, int group) const {
        task.group = task.first_group = group;
        task.end_of_groups = std::min(group + together, groups);
    }
    void begin_next_box(Task& task) const {
        if (task.end_of_groups < groups) {
            task.strip = task.first_strip;
            return begin_groups(task, task.end_of_groups);
        }
        begin_groups(task, 0);
        if (task.end_of_strips < strips) return begin_strips(task, task.end_of_strips);
        begin_strips(task, 0);
        begin_image(task, task.end);
    }
};

}  // namespace mkf::MKF_ISA

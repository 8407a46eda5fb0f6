//! The report as a table that a person can read, in a terminal of 80 columns too.

use crate::{
    bench::{
        look::{Ink, Look},
        report::{FIO, Hop, Report, Sweep},
    },
    policy::format_size,
    quantities::ByteCount,
    text::cut,
};

const HEADERS: [&str; 6] = ["hop", "where", "GB/s", "spread", "p50", "p99"];
/// The heading of what follows the columns.
const REMARKS: &str = "of its limit, and more";
/// Characters of a place at most; of a longer one the end is shown.
const PLACE: usize = 21;
/// Remarks stand in a column of their own if it has so many characters, else in a line below.
const REMARKS_COLUMN: usize = 26;

/// Everything, for a terminal. Rates are medians; GB is 1e9 bytes.
pub fn text(report: &Report, look: Look) -> String {
    let mut page = Page { out: String::new(), look };
    let ranks = report.ranks.map(|ranks| format!(", {ranks} ranks at once")).unwrap_or_default();
    page.paragraph(Ink::Strong, &format!("{}, {}{ranks}", report.machine.describe(), report.date));
    page.out.push('\n');
    page.hops(&report.hops);
    page.below(&report.hops);
    for sweep in &report.sweeps {
        page.out.push('\n');
        page.line(Ink::Strong, &title(sweep));
        let rows = matrix(sweep);
        let fits = aligned(&rows, 1).iter().all(|line| line.chars().count() <= look.columns);
        aligned(&if fits { rows } else { transposed(&rows) }, 1).iter().for_each(|line| page.line(Ink::Plain, line));
    }
    page.fio(&report.hops);
    for note in &report.notes {
        page.out.push('\n');
        page.paragraph(Ink::Plain, note);
    }
    page.out.push('\n');
    page.doubts(super::report::doubted(&report.hops), &report.doubts, report.verdict.is_empty());
    for sentence in &report.verdict {
        page.paragraph(Ink::Good, sentence);
    }
    page.out
}

/// What is written so far.
struct Page {
    out: String,
    look: Look,
}

impl Page {
    fn line(&mut self, ink: Ink, line: &str) {
        self.out += &self.look.inked(ink, line);
        self.out.push('\n');
    }

    fn paragraph(&mut self, ink: Ink, text: &str) {
        cut(text, self.look.columns, "", "").iter().for_each(|line| self.line(ink, line));
    }

    fn item(&mut self, ink: Ink, text: &str) {
        cut(&format!("- {text}"), self.look.columns, "  ", "").iter().for_each(|line| self.line(ink, line));
    }

    /// The hops that were measured, and why others were not.
    fn hops(&mut self, hops: &[Hop]) {
        let measured: Vec<&Hop> = hops.iter().filter(|hop| hop.figure.is_some()).collect();
        let mut rows: Vec<Vec<String>> = vec![HEADERS.map(str::to_owned).into()];
        rows.extend(measured.iter().map(|hop| row(hop)));
        let lines = aligned(&rows, 2);
        let width = lines.iter().map(|line| line.chars().count()).max().unwrap_or(0) + 2;
        let room = self.look.columns.saturating_sub(width);
        let all = std::iter::once(REMARKS.to_owned()).chain(measured.iter().map(|hop| remarks(hop)));
        for (n, (line, remarks)) in lines.iter().zip(all).enumerate() {
            let ink = if n == 0 { Ink::Strong } else { Ink::Plain };
            if n == 0 && room < REMARKS_COLUMN {
                self.line(ink, line);
            } else if room < REMARKS_COLUMN {
                self.line(ink, line);
                let below = listed(&remarks, self.look.columns - 6);
                below.iter().filter(|part| !part.is_empty()).for_each(|part| self.line(ink, &format!("      {part}")));
            } else {
                for (n, part) in listed(&remarks, room).iter().enumerate() {
                    let before = if n == 0 { line.as_str() } else { "" };
                    self.line(ink, format!("{before:<width$}{part}").trim_end());
                }
            }
        }
        for hop in hops.iter().filter(|hop| hop.skipped.is_some()) {
            let why = hop.skipped.as_deref().unwrap_or_default();
            self.paragraph(Ink::Warning, &format!("{} {}: {why}", hop.name, hop.place));
        }
    }

    /// What the columns mean, and what all hops of a kind have in common.
    fn below(&mut self, hops: &[Hop]) {
        self.out.push('\n');
        self.paragraph(
            Ink::Plain,
            "host_memory counts what certainly moves: 24 bytes per fp64 element of the triad, as STREAM does, 26 per bf16 parameter in \
             place; adamw_cpu 26, adamw_nvme 20, train_traffic 26 over links and disks; device_memory reads and writes together. p50 and \
             p99 are of one block or piece.",
        );
        let measured = || hops.iter().filter(|hop| hop.figure.is_some());
        let mut flights: Vec<(u64, u64, Vec<&str>)> = Vec::new();
        for hop in measured() {
            let (Some(depth), Some(block)) = (hop.depth, hop.block) else { continue };
            match flights.iter_mut().find(|(d, b, _)| (*d, *b) == (depth, block)) {
                Some((.., names)) if names.contains(&hop.name.as_str()) => {}
                Some((.., names)) => names.push(&hop.name),
                None => flights.push((depth, block, vec![&hop.name])),
            }
        }
        let flights: Vec<String> = (flights.iter())
            .map(|(depth, block, names)| format!("{depth} x {} ({})", format_size(ByteCount(*block)), names.join(", ")))
            .collect();
        if !flights.is_empty() {
            self.paragraph(Ink::Plain, &format!("In flight: {}.", flights.join("; ")));
        }
        if let Some(engine) = measured().find_map(|hop| hop.engine.as_ref()) {
            self.paragraph(Ink::Plain, &format!("Disks: {engine}, around the page cache."));
        }
        let mut cut: Vec<&str> =
            measured().map(|hop| hop.place.as_str()).filter(|place| place.chars().count() > PLACE).collect();
        cut.dedup();
        cut.iter().for_each(|place| self.paragraph(Ink::Plain, &format!("{} is {place}", shortened(place))));
    }

    /// The command for fio of the reads over all paths; those of the other hops differ in one word.
    fn fio(&mut self, hops: &[Hop]) {
        let Some(command) = hops.iter().rev().find(|hop| hop.name == "nvme_read").and_then(|hop| hop.fio.as_deref())
        else {
            return;
        };
        self.out.push('\n');
        self.paragraph(
            Ink::Plain,
            "nvme_read with fio (nvme_write: rw=write, nvme_read_write: rw=rw; on virtual disks with \
             GLIBC_TUNABLES=glibc.malloc.hugetlb=1, as our buffers are):",
        );
        cut(command, self.look.columns - 2, "  ", " \\")
            .iter()
            .for_each(|line| self.line(Ink::Plain, &format!("  {line}")));
    }

    fn doubts(&mut self, title: &str, doubts: &[String], no_verdict: bool) {
        if doubts.is_empty() {
            return;
        }
        self.line(Ink::Warning, title);
        doubts.iter().for_each(|doubt| self.item(Ink::Warning, doubt));
        let instead = if no_verdict { "No verdict is given, and no profile is saved. " } else { "" };
        self.paragraph(
            Ink::Warning,
            &format!("{instead}Run it again on a quiet machine, or with --force all the same."),
        );
    }
}

/// Lines of a list of remarks, broken between them where there is room.
fn listed(remarks: &str, columns: usize) -> Vec<String> {
    let whole = remarks.replace(' ', "\u{a0}").replace(",\u{a0}", ", ");
    cut(&whole, columns, "", "").into_iter().map(|line| line.replace('\u{a0}', " ")).collect()
}

fn row(hop: &Hop) -> Vec<String> {
    let figure = hop.figure.as_ref();
    let of = |f: fn(&super::report::Figure) -> String| figure.map_or_else(String::new, f);
    vec![
        hop.name.clone(),
        shortened(&hop.place),
        of(|f| format!("{:.2}", f.bytes_per_second / 1e9)),
        of(super::report::Figure::spread_shown),
        of(|f| micros(f.p50_us)),
        of(|f| micros(f.p99_us)),
    ]
}

/// The end of a place that is too long for its column.
fn shortened(place: &str) -> String {
    let len = place.chars().count();
    if len <= PLACE {
        place.to_owned()
    } else {
        format!("...{}", place.chars().skip(len - (PLACE - 3)).collect::<String>())
    }
}

/// What else there is to say: the part of the limit that was reached, parameters, copies beside it, fio.
pub(super) fn remarks(hop: &Hop) -> String {
    let limit = hop.limit.as_ref().map(|limit| {
        if limit.is_exceeded() {
            format!("more than {}, which was measured too low", limit.by)
        } else {
            format!("{:.2} of {}", limit.fraction, limit.by)
        }
    });
    let fio = match &hop.limit {
        Some(limit) if limit.by == FIO => None,
        _ => hop.fio_bytes_per_second.map(|fio| format!("fio {:.2} GB/s", fio / 1e9)),
    };
    let figure = hop.figure.as_ref();
    let params = figure.and_then(|f| f.params_per_second).map(|params| format!("{:.3} Gparam/s", params / 1e9));
    let copies = figure.and_then(|f| f.copied_per_second).map(|copies| format!("copies {:.2} GB/s", copies / 1e9));
    let each = figure.and_then(|figure| per_rank(&figure.per_rank));
    [each, limit, params, copies, fio].into_iter().flatten().collect::<Vec<_>>().join(", ")
}

/// The rate of each rank, or from the slowest to the fastest.
fn per_rank(rates: &[f64]) -> Option<String> {
    let gigabytes = |rate: f64| format!("{:.2}", rate / 1e9);
    let low = gigabytes(rates.iter().copied().reduce(f64::min)?);
    let high = gigabytes(rates.iter().copied().reduce(f64::max)?);
    let all = if low == high { low } else { format!("{low} to {high}") };
    Some(format!("{all} GB/s per rank"))
}

/// `87 us`, `3.4 ms`, `340 ms`.
pub(super) fn micros(us: f64) -> String {
    match us {
        us if us < 1000.0 => format!("{us:.0} us"),
        us if us < 99_950.0 => format!("{:.1} ms", us / 1000.0),
        us => format!("{:.0} ms", us / 1000.0),
    }
}

/// What a sweep shows.
pub(super) fn title(sweep: &Sweep) -> String {
    match (sweep.over, sweep.name.as_str()) {
        ("threads", _) => "host memory and AdamW on the processor, GB/s by threads".to_owned(),
        (_, "link") => "copies between host and device, GB/s by block".to_owned(),
        (_, name) => format!("{name}, GB/s by block and depth"),
    }
}

/// A value of a sweep's x.
pub(super) fn tick(sweep: &Sweep, x: u64) -> String {
    if sweep.over == "threads" { x.to_string() } else { format_size(ByteCount(x)) }
}

fn matrix(sweep: &Sweep) -> Vec<Vec<String>> {
    let mut xs: Vec<u64> = sweep.series.iter().flat_map(|s| s.points.iter().map(|p| p.0)).collect();
    xs.sort_unstable();
    xs.dedup();
    let mut rows = vec![std::iter::once(String::new()).chain(xs.iter().map(|&x| tick(sweep, x))).collect::<Vec<_>>()];
    for series in &sweep.series {
        let at =
            |x: &u64| series.points.iter().find(|p| p.0 == *x).map_or("-".to_owned(), |p| format!("{:.2}", p.1 / 1e9));
        rows.push(std::iter::once(series.label.clone()).chain(xs.iter().map(at)).collect());
    }
    rows
}

/// Rows as columns.
fn transposed(rows: &[Vec<String>]) -> Vec<Vec<String>> {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    (0..columns).map(|n| rows.iter().map(|row| row.get(n).cloned().unwrap_or_default()).collect()).collect()
}

/// Columns of equal width; the first `left` of them begin left, the others end right.
fn aligned(rows: &[Vec<String>], left: usize) -> Vec<String> {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |n: usize| rows.iter().filter_map(|row| row.get(n)).map(|cell| cell.chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let line = |row: &Vec<String>| {
        let cells = row.iter().zip(&widths).enumerate();
        let cells = cells
            .map(|(n, (cell, &width))| if n < left { format!("{cell:<width$}") } else { format!("{cell:>width$}") });
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    rows.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::{
        report::{Limit, Series},
        verdict::tests::hop,
    };

    fn page(columns: usize) -> Page {
        Page { out: String::new(), look: Look { columns, colour: false } }
    }

    #[test]
    fn columns_stand_under_each_other() {
        let rows = [vec!["a".to_owned(), "1".to_owned()], vec!["bcd".to_owned(), "1234".to_owned()]];
        assert_eq!(aligned(&rows, 1), ["a       1", "bcd  1234"]);
        assert_eq!(transposed(&rows), [["a", "bcd"], ["1", "1234"]]);
    }

    #[test]
    fn a_row_has_a_cell_for_every_header() {
        let row = row(&hop("nvme_read", 2.15e9));
        assert_eq!((row.len(), row[2].as_str()), (HEADERS.len(), "2.15"));
        assert_eq!(row[3], "-", "one round has no spread");
        let mut twice = hop("nvme_read", 2.15e9);
        twice.figure.iter_mut().for_each(|figure| (figure.rates, figure.spread) = (vec![1e9, 2e9], 0.125));
        assert_eq!(super::row(&twice)[3], "12 %");
        assert_eq!([12.4, 3456.0, 99_949.0, 363_400.0].map(micros), ["12 us", "3.5 ms", "99.9 ms", "363 ms"]);
        assert_eq!(shortened("/mnt/a/very/long/path/of/a/user"), "...ong/path/of/a/user");
    }

    #[test]
    fn nothing_is_wider_than_the_terminal() {
        let mut hops: Vec<Hop> =
            ["nvme_read_write", "adamw_and_copies", "train_traffic"].map(|name| hop(name, 123.45e9)).into();
        for hop in &mut hops {
            hop.place = "/mnt/a/very/long/path/of/a/user".to_owned();
            hop.limit = Some(Limit { by: "nvme_read_write".to_owned(), bytes_per_second: 1e9, fraction: 0.97 });
            hop.figure.iter_mut().for_each(|figure| figure.params_per_second = Some(1.234e9));
            hop.fio = Some(
                "fio --name=nvme_read --filename=/mnt/a/fio.tmp --rw=read --bs=1048576 --size=536870912 --direct=1"
                    .to_owned(),
            );
        }
        hops[0].name = "nvme_read".to_owned();
        for columns in [80, 100] {
            let mut page = page(columns);
            page.hops(&hops);
            page.below(&hops);
            page.fio(&hops);
            page.doubts(
                "These figures are not to be relied on:",
                &["the rounds of nvme_read_write lie far apart: its median is anywhere from 1.00 to 2.00 GB/s"
                    .to_owned()],
                true,
            );
            assert!(page.out.lines().all(|line| line.chars().count() <= columns), "{}", page.out);
            assert!(
                page.out.contains("0.97 of nvme_read_write,") && page.out.contains("1.234 Gparam/s"),
                "{}",
                page.out
            );
            assert!(
                page.out.contains("is /mnt/a/very/long/path/of/a/user") && page.out.contains(" \\\n"),
                "{}",
                page.out
            );
        }
    }

    #[test]
    fn more_than_the_limit_is_no_part_of_it() {
        let mut hop = hop("train_traffic", 1e9);
        hop.limit = Some(Limit { by: "nvme_read_write".to_owned(), bytes_per_second: 0.2e9, fraction: 3.9 });
        assert_eq!(remarks(&hop), "more than nvme_read_write, which was measured too low");
    }

    #[test]
    fn ranks_at_once_have_their_rates_beside_the_sum() {
        let mut hop = hop("adamw_cpu", 3e9);
        let said = |hop: &mut Hop, rates: &[f64]| {
            hop.figure.iter_mut().for_each(|figure| figure.per_rank = rates.to_vec());
            remarks(hop)
        };
        assert_eq!(said(&mut hop, &[1e9, 2e9, 1.5e9]), "1.00 to 2.00 GB/s per rank");
        assert_eq!(
            (said(&mut hop, &[1e9, 1e9]), said(&mut hop, &[])),
            ("1.00 GB/s per rank".to_owned(), String::new())
        );
    }

    #[test]
    fn a_sweep_with_gaps_keeps_its_columns() {
        let series = |label: &str, points: &[(u64, f64)]| Series { label: label.to_owned(), points: points.into() };
        let series = vec![series("depth 1", &[(4096, 1e9), (8192, 2e9)]), series("depth 2", &[(4096, 3e9)])];
        let rows = matrix(&Sweep { name: "nvme_read".to_owned(), over: "block", series });
        assert_eq!(rows, [["", "4KiB", "8KiB"], ["depth 1", "1.00", "2.00"], ["depth 2", "3.00", "-"]]);
    }
}

//! The report as one page that needs nothing else: no network, no script.

use crate::bench::{
    report::{Hop, Load, MARK, Report, Sweep},
    stats::as_f64,
    table::{micros, remarks, tick, title},
};

const STYLE: &str = include_str!("page.css");
/// Colours that can be told apart in print and with colour blindness.
const COLOURS: [&str; 6] = ["#2f6fde", "#e0782b", "#1f9d76", "#b3469b", "#8a6d1a", "#6b7785"];
/// Size of a plot.
const WIDTH: f64 = 480.0;
const HEIGHT: f64 = 260.0;
/// Room for the labels: left and right, below.
const SIDE: f64 = 44.0;
const FOOT: f64 = 34.0;

/// The page.
pub fn page(report: &Report) -> String {
    let machine = escaped(&report.machine.describe());
    let mut out = format!(
        "<!doctype html>\n<!-- {MARK} -->\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\
         <title>Bandwidths of {}</title>\n<style>\n{STYLE}</style></head><body>\n\
         <h1>Bandwidths of {0}</h1>\n<p class=\"soft\">{machine}<br>{}{} &middot; funicular {} &middot; medians; GB is 1e9 bytes</p>\n",
        escaped(&report.machine.host),
        escaped(&report.date),
        report.ranks.map(|ranks| format!(" &middot; {ranks} ranks at once")).unwrap_or_default(),
        report.version,
    );
    if !report.doubts.is_empty() {
        let doubts: String = report.doubts.iter().map(|doubt| format!("<li>{}</li>", escaped(doubt))).collect();
        out +=
            &format!("<div class=\"notes\"><p>{}</p><ul>{doubts}</ul></div>\n", super::report::doubted(&report.hops));
    }
    out += "<div class=\"verdict\">";
    out += &report.verdict.iter().map(|sentence| format!("<p>{}</p>", escaped(sentence))).collect::<String>();
    out += "</div>\n";
    if !report.notes.is_empty() {
        let notes: String = report.notes.iter().map(|note| format!("<p>{}</p>", escaped(note))).collect();
        out += &format!("<div class=\"notes soft\">{notes}</div>\n");
    }
    out += &loads("What a step loads, with AdamW's states on NVMe", &report.with_nvme);
    out += &loads("What a step loads, with the states in host memory", &report.in_memory);
    out += &limits(&report.hops);
    out += &hops(&report.hops);
    out += "<h2>Sweeps</h2>\n<div class=\"plots\">\n";
    out += &report.sweeps.iter().map(plot).collect::<String>();
    out += "</div>\n";
    let commands: Vec<String> = report.hops.iter().filter_map(|hop| hop.fio.as_deref()).map(escaped).collect();
    if !commands.is_empty() {
        out += &format!("<h2>The same with fio</h2>\n<pre>{}</pre>\n", commands.join("\n"));
    }
    out + "</body></html>\n"
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// One bar: label, filled part (0 to 1), what stands behind it.
fn bar(label: &str, part: f64, behind: &str) -> String {
    format!(
        "<div>{}</div><div class=\"track\"><div class=\"fill\" style=\"width:{:.1}%\"></div></div><div>{}</div>\n",
        escaped(label),
        part.clamp(0.0, 1.0) * 100.0,
        escaped(behind)
    )
}

/// Seconds per 1e9 parameters of each part of the machine; the longest bar binds.
fn loads(title: &str, loads: &[Load]) -> String {
    let Some(slowest) = loads.first() else { return String::new() };
    let bars = loads.iter().map(|load| {
        let seconds = 1e9 / load.params_per_second;
        let behind = format!("{seconds:.2} s for 1e9 parameters ({} bytes each)", load.bytes);
        bar(&load.hop, slowest.params_per_second / load.params_per_second, &behind)
    });
    format!("<h2>{}</h2>\n<div class=\"bars\">\n{}</div>\n", escaped(title), bars.collect::<String>())
}

/// A bar for each hop whose limit is known.
fn limits(hops: &[Hop]) -> String {
    let bars = hops.iter().filter_map(|hop| {
        let limit = hop.limit.as_ref()?;
        let part = if limit.is_exceeded() {
            format!("more than {}, which was measured too low", limit.by)
        } else {
            format!("{:.0} % of {}", limit.fraction * 100.0, limit.by)
        };
        let behind = format!("{:.2} of {:.2} GB/s: {part}", hop.rate() / 1e9, limit.bytes_per_second / 1e9);
        Some(bar(&format!("{} ({})", hop.name, hop.place), limit.fraction, &behind))
    });
    format!("<h2>Each against its limit</h2>\n<div class=\"bars\">\n{}</div>\n", bars.collect::<String>())
}

fn hops(hops: &[Hop]) -> String {
    let headers = [
        "hop",
        "where",
        "GB/s",
        "GiB/s",
        "spread",
        "p50",
        "p99",
        "block",
        "depth",
        "engine",
        "direct",
        "of its limit, and more",
    ];
    let head: String = headers.iter().map(|header| format!("<th>{header}</th>")).collect();
    let rows = hops.iter().map(|hop| {
        let cells: Vec<String> = match &hop.figure {
            None => {
                let why = hop.skipped.as_deref().unwrap_or("not measured");
                return format!(
                    "<tr><td>{}</td><td>{}</td><td colspan=\"10\" style=\"white-space:normal\">{}</td></tr>\n",
                    escaped(&hop.name),
                    escaped(&hop.place),
                    escaped(why)
                );
            }
            Some(figure) => vec![
                hop.name.clone(),
                hop.place.clone(),
                format!("{:.2}", figure.bytes_per_second / 1e9),
                format!("{:.2}", figure.bytes_per_second / f64::from(1 << 30)),
                figure.spread_shown(),
                micros(figure.p50_us),
                micros(figure.p99_us),
                hop.block.map_or_else(String::new, |block| crate::quantities::ByteCount(block).to_string()),
                hop.depth.map_or_else(String::new, |depth| depth.to_string()),
                hop.engine.clone().unwrap_or_default(),
                hop.direct.map_or_else(String::new, |direct| if direct { "yes" } else { "no" }.to_owned()),
                remarks(hop),
            ],
        };
        let cells: String = cells.iter().map(|cell| format!("<td>{}</td>", escaped(cell))).collect();
        format!("<tr>{cells}</tr>\n")
    });
    format!(
        "<h2>All hops</h2>\n<div class=\"scroll\"><table>\n<tr>{head}</tr>\n{}</table></div>\n",
        rows.collect::<String>()
    )
}

/// A round number at or above `most`, for the top of an axis.
fn ceiling(most: f64) -> f64 {
    let power = 10_f64.powf(most.max(1e-9).log10().floor());
    [1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0].into_iter().map(|n| n * power).find(|&n| n >= most).unwrap_or(most)
}

/// Curves over a logarithmic x.
fn plot(sweep: &Sweep) -> String {
    let mut xs: Vec<u64> = sweep.series.iter().flat_map(|series| series.points.iter().map(|point| point.0)).collect();
    xs.sort_unstable();
    xs.dedup();
    let (Some(&first), Some(&last)) = (xs.first(), xs.last()) else { return String::new() };
    let rates = sweep.series.iter().flat_map(|series| series.points.iter().map(|point| point.1 / 1e9));
    let top = ceiling(rates.fold(0.0, f64::max));
    let span = (as_f64(last) / as_f64(first)).log2().max(1.0);
    let x = |value: u64| SIDE + (as_f64(value) / as_f64(first)).log2() / span * (WIDTH - 2.0 * SIDE);
    let y = |rate: f64| 10.0 + (1.0 - rate / top) * (HEIGHT - FOOT - 10.0);
    let mut drawn = String::new();
    for step in 0..=4 {
        let rate = top * f64::from(step) / 4.0;
        let at = y(rate);
        drawn +=
            &format!("<line class=\"grid\" x1=\"{SIDE}\" x2=\"{:.0}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>", WIDTH - SIDE);
        let (left, low, rate) = (SIDE - 6.0, at + 4.0, short(rate));
        drawn += &format!("<text x=\"{left:.0}\" y=\"{low:.1}\" text-anchor=\"end\">{rate}</text>");
    }
    for &value in &xs {
        drawn += &format!(
            "<text x=\"{:.1}\" y=\"{:.0}\" text-anchor=\"middle\">{}</text>",
            x(value),
            HEIGHT - FOOT + 18.0,
            tick(sweep, value)
        );
    }
    let mut key = String::new();
    let drawable = sweep.series.iter().filter(|series| !series.points.is_empty());
    for (series, colour) in drawable.zip(COLOURS.iter().cycle()) {
        let points: Vec<(f64, f64)> = series.points.iter().map(|&(value, rate)| (x(value), y(rate / 1e9))).collect();
        let path: Vec<String> = points.iter().map(|(x, y)| format!("{x:.1} {y:.1}")).collect();
        drawn += &format!("<path stroke=\"{colour}\" d=\"M{}\"/>", path.join(" L"));
        let dots =
            points.iter().map(|(x, y)| format!("<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\" fill=\"{colour}\"/>"));
        drawn += &dots.collect::<String>();
        key += &format!("<span><i style=\"background:{colour}\"></i>{}</span>", escaped(&series.label));
    }
    format!(
        "<figure><figcaption>{}</figcaption><svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\">{drawn}</svg>\
         <div class=\"key\">{key}</div></figure>\n",
        escaped(&title(sweep))
    )
}

/// At most two decimals, and none that are zero.
fn short(rate: f64) -> String {
    let text = format!("{rate:.2}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::report::Series;

    #[test]
    fn what_users_name_cannot_become_markup() {
        assert_eq!(escaped("<b a=\"1\">&"), "&lt;b a=&quot;1&quot;&gt;&amp;");
        assert!(
            bar("/mnt/<x>", 2.0, "")
                .contains("/mnt/&lt;x&gt;</div><div class=\"track\"><div class=\"fill\" style=\"width:100.0%\">")
        );
    }

    #[test]
    fn axes_end_in_round_numbers() {
        assert_eq!([0.0023, 0.9, 2.31, 55.5, 101.0].map(|n| short(ceiling(n))), ["0", "1", "3", "60", "150"]);
        assert_eq!(short(2.5), "2.5");
    }

    #[test]
    fn curves_stay_inside_the_plot() {
        let series = Series { label: "depth 4".to_owned(), points: vec![(4096, 1e9), (1 << 20, 2e9)] };
        let drawn = plot(&Sweep { name: "nvme_read".to_owned(), over: "block", series: vec![series] });
        assert!(drawn.contains("M44.0 118.0 L436.0 10.0"), "{drawn}");
        assert!(drawn.contains(">1MiB</text>") && drawn.contains("depth 4"), "{drawn}");
        let one = Series { label: "x".to_owned(), points: vec![(2, 1e9)] };
        assert!(plot(&Sweep { name: "p".to_owned(), over: "threads", series: vec![one] }).contains("cx=\"44.0\""));
    }
}
